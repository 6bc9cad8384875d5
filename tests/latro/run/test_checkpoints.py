from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file

from latro.run.checkpoints import (
    MANIFEST,
    PARTIAL,
    check_checkpoint,
    damage,
    last_whole_checkpoint,
    publish,
    rotate,
    write_manifest,
)
from latro.run.restoring import saved_names_known
from scripts.make_tiny_model import two_layers


@pytest.fixture
def checkpoint(tmp_path):
    """Return `checkpoint(step, manifest=True)`, which makes a folder with a checkpoint's files."""

    def write(step, manifest=True):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "optimizer_0").mkdir(parents=True)
        save_file({"weight": torch.randn(8, 8), "bias": torch.randn(8)}, folder / "a.safetensors")
        torch.save({"step": step}, folder / "optimizer.pt")
        torch.save({"step": step}, folder / "scheduler.pt")
        (folder / "optimizer_0" / "__0_0.distcp").write_bytes(bytes(range(256)))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if manifest:
            write_manifest(folder)
        return folder

    return write


FILES = ("a.safetensors", "optimizer.pt", "optimizer_0/__0_0.distcp", "trainer_state.json")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(cut, r"[\d,]+ bytes, expected [\d,]+"), (flip, "its CRC-32 is"), ("unlink", "missing")],
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    checkpoint, tmp_path, caplog, name, spoil, why
):
    older, newer = checkpoint(9), checkpoint(10)
    assert damage(newer) is None
    assert last_whole_checkpoint(str(tmp_path)) == str(newer)
    assert not caplog.records
    path = newer / name
    path.unlink() if spoil == "unlink" else spoil(path)
    assert last_whole_checkpoint(str(tmp_path)) == str(older)
    (record,) = caplog.records
    assert str(newer) in record.message
    assert f"{name}: " in record.message
    if name != "trainer_state.json" or spoil != "unlink":
        with pytest.raises(ValueError, match=rf"checkpoint-10 is damaged: {name}: {why}"):
            check_checkpoint(str(newer))
    shutil.rmtree(older)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        last_whole_checkpoint(str(tmp_path))


def listing(name="trainer_state.json", size=16, checksum="0" * 8):
    return json.dumps({"files": {name: {"bytes": size, "crc32": checksum}}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b"[" * 100_000, b"1" * 5000),
        *(b'{"files": []}', b'{"files": null}', b'{"files": {"a": []}}', b'{"files": {"a": 1}}'),
        *(listing(size="16"), listing(size=1.5), listing(size=True), listing(checksum=0)),
        *(listing("/etc/passwd"), listing("../checkpoint-2/trainer_state.json")),
    ],
    ids=lambda content: content.decode(errors="replace")[:40],
)
def test_a_manifest_that_cannot_be_read_is_damage(checkpoint, tmp_path, content):
    older, newer = checkpoint(1), checkpoint(2)
    (newer / MANIFEST).write_bytes(content)
    assert damage(newer).startswith(f"{MANIFEST}: cannot be read")
    assert last_whole_checkpoint(str(tmp_path)) == str(older)


@pytest.mark.parametrize("content", [b'{"files": {}}', listing("a.safetensors")])
def test_a_manifest_that_lists_no_checkpoint_is_damage(checkpoint, content):
    folder = checkpoint(1)
    (folder / MANIFEST).write_bytes(content)
    assert damage(folder) == f"{MANIFEST}: does not list trainer_state.json"


@pytest.mark.parametrize(
    ("name", "why"), [("a" * 300, "File name too long"), ("a\0b", "embedded null byte")]
)
def test_a_listed_name_that_no_file_can_have_is_damage(checkpoint, name, why):
    folder = checkpoint(1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "crc32": "0" * 8}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) == f"{name}: {why}"


@contextmanager
def ordinary_user():
    """Become an ordinary user, since root may read any file."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def as_file(path):
    path.write_text("notes")


def as_link_loop(path):
    path.symlink_to(path)


def as_dangling_link(path):
    path.symlink_to(path.with_name("gone"))


def as_pipe(path):
    os.mkfifo(path)


def as_empty_folder(path):
    path.mkdir()


STRANGE = {
    as_file: "Not a directory",
    as_link_loop: "Too many levels of symbolic links",
    as_dangling_link: "No such file or directory",
    as_pipe: "Not a directory",
    as_empty_folder: "trainer_state.json: missing",
}


@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_checkpoint_is_named_and_the_one_before_taken(
    checkpoint, tmp_path, caplog, make
):
    older = checkpoint(9)
    newer = tmp_path / "checkpoint-12"
    make(newer)
    assert last_whole_checkpoint(str(tmp_path)) == str(older)
    (record,) = caplog.records
    assert record.message.startswith(f"{newer} is damaged and left out: ")
    assert STRANGE[make] in record.message
    with pytest.raises(ValueError, match=r"checkpoint-12', which has no trainer_state\.json"):
        check_checkpoint(str(newer))


def test_an_unreadable_folder_is_named_and_the_one_before_taken(checkpoint, caplog):
    # pytest's own folders are open only to the user who runs it.
    with TemporaryDirectory() as run_dir:
        older = Path(run_dir) / "checkpoint-9"
        shutil.copytree(checkpoint(9), older)
        newer = Path(run_dir) / "checkpoint-12"
        newer.mkdir(mode=0)
        os.chmod(run_dir, 0o755)
        for path in (older, *older.rglob("*")):
            path.chmod(0o755)
        with ordinary_user():
            assert last_whole_checkpoint(run_dir) == str(older)
            with pytest.raises(ValueError, match=r"checkpoint-12', which has no trainer_state"):
                check_checkpoint(str(newer))
    assert f"{newer} is damaged and left out: cannot be read" in caplog.text
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize("name", [MANIFEST, "trainer_state.json", "a.safetensors"])
@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("make", [as_link_loop, as_pipe, as_empty_folder])
def test_what_is_no_file_in_a_checkpoint_is_damage(checkpoint, make, manifest, name):
    folder = checkpoint(1, manifest)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert damage(folder).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["x", "12x", "", "-3", "1.5", "²", "١٢", "12 "])
def test_only_numbered_folders_are_checkpoints(checkpoint, tmp_path, name):
    older = checkpoint(9)
    shutil.copytree(older, tmp_path / f"checkpoint-{name}")
    assert last_whole_checkpoint(str(tmp_path)) == str(older)
    rotate(tmp_path, 1, {older})
    assert (tmp_path / f"checkpoint-{name}").exists()


def test_the_largest_number_is_the_newest(checkpoint, tmp_path):
    checkpoint(9)
    newest = checkpoint("9" * 200)
    assert last_whole_checkpoint(str(tmp_path)) == str(newest)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"global_step": "9"}', "[" * 100_000])
def test_without_a_manifest_the_state_has_its_update(checkpoint, content):
    folder = checkpoint(1, manifest=False)
    (folder / "trainer_state.json").write_text(content)
    assert damage(folder).startswith("trainer_state.json: ")


@pytest.mark.parametrize("content", [b"", b"\1\0", b"\xff" * 9, b"\2\0\0\0\0\0\0\0[]"])
def test_without_a_manifest_the_headers_tell(checkpoint, content):
    folder = checkpoint(1, manifest=False)
    assert damage(folder) is None
    check_checkpoint(str(folder))
    weights = folder / "a.safetensors"
    whole = weights.read_bytes()
    cut(weights)
    assert damage(folder) == f"a.safetensors: {len(whole) - 1} bytes, expected {len(whole)}"
    weights.write_bytes(content)
    assert damage(folder).startswith("a.safetensors: ")
    weights.write_bytes(whole)
    (folder / "trainer_state.json").write_text('{"global')
    assert damage(folder).startswith("trainer_state.json: not JSON")
    (folder / "trainer_state.json").unlink()
    assert damage(folder) == "trainer_state.json: missing"
    with pytest.raises(ValueError, match=r"has no trainer_state\.json"):
        check_checkpoint(str(folder))


@pytest.mark.parametrize("lost", ["optimizer", "scheduler"])
def test_one_of_weights_alone_is_refused(checkpoint, tmp_path, lost):
    older, newer = checkpoint(1), checkpoint(2, manifest=False)
    shutil.rmtree(newer / "optimizer_0")
    (newer / f"{lost}.pt").unlink()
    write_manifest(newer)
    assert damage(newer) is None
    for resume in (lambda: check_checkpoint(str(newer)), lambda: last_whole_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=r"checkpoint-2 lacks the state of .* save_only"):
            resume()
    check_checkpoint(str(older))


@pytest.mark.parametrize("engine", [("optimizer.bin", "scheduler.pt"), ("global_step3/x.pt",)])
def test_the_engines_states_are_known(checkpoint, engine):
    folder = checkpoint(3, manifest=False)
    shutil.rmtree(folder / "optimizer_0")
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    for name in engine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    check_checkpoint(str(folder))


def test_published_it_takes_the_place_of_one_of_the_same_step(checkpoint, tmp_path):
    run_dir = tmp_path / "run"
    for content in ("first", "second"):
        folder = checkpoint(3, manifest=False)
        (folder / "note").write_text(content)
        (run_dir / PARTIAL).mkdir(parents=True, exist_ok=True)
        publish(folder, run_dir)
        assert (run_dir / "checkpoint-3" / "note").read_text() == content
        assert damage(run_dir / "checkpoint-3") is None
        assert not folder.exists()


@pytest.mark.parametrize("make", [as_file, as_link_loop, as_dangling_link])
def test_published_it_takes_the_place_of_what_is_no_folder(checkpoint, tmp_path, make):
    run_dir = tmp_path / "run"
    (run_dir / PARTIAL).mkdir(parents=True)
    make(run_dir / "checkpoint-3")
    publish(checkpoint(3, manifest=False), run_dir)
    assert damage(run_dir / "checkpoint-3") is None


def test_rotation_leaves_what_is_no_folder(checkpoint, tmp_path):
    newest = checkpoint(9)
    as_file(tmp_path / "checkpoint-8")
    rotate(tmp_path, 1, {newest})
    assert (tmp_path / "checkpoint-8").read_text() == "notes"


def test_rotation_keeps_the_newest_and_the_best(checkpoint, tmp_path):
    folders = {step: checkpoint(step) for step in (2, 9, 10, 11)}
    (tmp_path / "checkpoint-x").mkdir()

    def left():
        return sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-[0-9]*"))

    for limit in (None, 0):
        rotate(tmp_path, limit, {folders[11]})
    assert left() == [2, 9, 10, 11]
    rotate(tmp_path, 3, {folders[11], folders[2]})
    assert left() == [2, 10, 11]
    rotate(tmp_path, 1, {folders[11], folders[2]})
    assert left() == [2, 11]
    # The checkpoint just saved stays, though later ones exist from before the run went back.
    rotate(tmp_path, 1, {folders[2]})
    assert left() == [2]
    assert (tmp_path / "checkpoint-x").exists()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_a_mixture_of_experts_goes_on_from_a_checkpoint(
    make_trainer, tokenizer, tmp_path, architecture
):
    """Its experts are saved one by one, under other names than the model's."""

    def model():
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        options = experts if architecture == "qwen3_moe" else {"num_local_experts": 4}
        return two_layers(architecture, tokenizer, head_dim=8, **options)

    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(model(), **settings)
    straight.train()
    folder = Path(straight.args.output_dir)
    resumed = make_trainer(model(), output_dir=str(tmp_path / "again"), max_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    ends = [trainer.model.state_dict() for trainer in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    weights = folder / "checkpoint-1" / "model.safetensors"
    first = load_file(weights)
    straight.state.best_model_checkpoint = str(folder / "checkpoint-1")
    straight._load_best_model()
    straight.save_model(str(tmp_path / "best"))
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert first.keys() == best.keys()
    assert all(torch.equal(best[name], tensor) for name, tensor in first.items())
    # What the file lacks is still an error.
    lacking = {n: t for n, t in first.items() if ".experts." not in n}
    with saved_names_known(straight.model):
        assert straight.model.load_state_dict(lacking, strict=False).missing_keys

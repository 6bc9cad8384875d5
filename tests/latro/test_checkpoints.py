from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from latro.checkpoints import (
    MANIFEST,
    check_checkpoint,
    damage,
    last_whole_checkpoint,
    publish,
    rotate,
    write_manifest,
)


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(step, manifest=True)`: a folder with the kinds of file that a checkpoint has."""

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


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"files": {"a": {"bytes": "x"}}}'])
def test_a_manifest_that_cannot_be_read_is_damage(checkpoint, content):
    folder = checkpoint(1)
    (folder / MANIFEST).write_bytes(content)
    assert damage(folder).startswith(f"{MANIFEST}: cannot be read")


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
        (run_dir / ".partial").mkdir(parents=True, exist_ok=True)
        publish(folder, run_dir)
        assert (run_dir / "checkpoint-3" / "note").read_text() == content
        assert damage(run_dir / "checkpoint-3") is None
        assert not folder.exists()


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
    # The one just saved stays, though the run was taken back and left later ones.
    rotate(tmp_path, 1, {folders[2]})
    assert left() == [2]
    assert (tmp_path / "checkpoint-x").exists()

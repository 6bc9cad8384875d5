"""Malformed checkpoints, servers, output folders and settings.

Commands end in one line that names them, with exit code 1, and lose no file.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.latro.fake_vllm import FakeVllm, choice
from tests.latro.hostile import ROWS, Case, Place, refused, snapshot, told_in_one_line
from tests.latro.test_vllm_answers import HEAD
from tests.warm_process import WarmProcess, free_port


@pytest.fixture(scope="module")
def good(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    warm: WarmProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a folder with a model, data, and a run on them with two checkpoints."""
    place = Place(tmp_path_factory.mktemp("good") / "place")
    tiny().save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    place.write_rows(*ROWS)
    place.arguments |= RUN
    finished = warm.start(
        "latro.train", place.command_line("latro.train"), place.root.parent / "printed"
    ).wait()
    assert finished.code == 0, finished
    return place.root


RUN = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    shutil.copytree(good / "model", tmp_path / "place" / "model")
    place = Place(tmp_path / "place")
    place.write_rows(*ROWS)
    return place


@pytest.fixture
def of_a_run(good: Path, tmp_path: Path) -> Place:
    """Return the place with the run, to resume from its first checkpoint."""
    place = Place(tmp_path / "place")
    shutil.copytree(good, place.root)
    # The model's path is part of the run's identity.
    place.arguments |= RUN | {"model_name_or_path": good / "model"}
    place.arguments |= {"dataset_name": good / "data.jsonl"}
    place.arguments |= {"resume_from_checkpoint": place.output / "checkpoint-2"}
    return place


def cut(path: Path, share: float = 0.5) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def checkpoint(change: Callable[[Path], object]) -> Callable[[Place], object]:
    return lambda place: change(place.output / "checkpoint-2")


def file(name: str, change: Callable[[Path], object]) -> Callable[[Place], object]:
    return checkpoint(lambda folder: change(folder / name))


def given(**arguments: object) -> Callable[[Place], None]:
    return lambda place: place.arguments.update(arguments)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def instead(make: Callable[[Path], object]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        folder = place.output / "checkpoint-2"
        shutil.rmtree(folder)
        make(folder)

    return spoil


def without_manifest(change: Callable[[Path], object]) -> Callable[[Place], object]:
    """Return a case: a checkpoint as other Trainers write it, without a manifest."""

    def spoil(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        change(folder)

    return checkpoint(spoil)


MANIFEST = "checkpoint_manifest.json"
HERE = "{output}/checkpoint-2"
CHECKPOINTS = {
    "missing": Case(instead(lambda path: None), HERE),
    "empty": Case(instead(Path.mkdir), HERE),
    "weights that are cut": Case(file("model.safetensors", cut), HERE + ".*model.safetensors"),
    "weights that are missing": Case(
        file("model.safetensors", Path.unlink), HERE + ".*model.safetensors"
    ),
    "a wrong bit": Case(file("model.safetensors", flip), HERE + ".*model.safetensors.*CRC"),
    "the optimiser is cut": Case(file("optimizer.pt", cut), HERE + ".*optimizer.pt"),
    "the optimiser is missing": Case(file("optimizer.pt", Path.unlink), HERE),
    "the schedule is missing": Case(file("scheduler.pt", Path.unlink), HERE),
    "the random state is missing": Case(file("rng_state.pth", Path.unlink), HERE),
    "the state is cut": Case(file("trainer_state.json", cut), HERE),
    "the state is missing": Case(file("trainer_state.json", Path.unlink), HERE),
    "a manifest that is cut": Case(file(MANIFEST, cut), HERE + f".*{MANIFEST}"),
    "a manifest that is a list": Case(
        file(MANIFEST, lambda path: path.write_text("[]")), HERE + f".*{MANIFEST}"
    ),
    "a manifest of nothing": Case(
        file(MANIFEST, lambda path: path.write_text('{"files": {}}')), HERE
    ),
    "a deep manifest": Case(file(MANIFEST, lambda path: path.write_text("[" * 10**5)), HERE),
    "no manifest, and a state that is cut": Case(
        without_manifest(lambda folder: cut(folder / "trainer_state.json")), HERE
    ),
    "no manifest, and weights that are cut": Case(
        without_manifest(lambda folder: cut(folder / "model.safetensors")), HERE
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(
    case: Case, of_a_run: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    refused(case, of_a_run, warm, tmp_path / "printed")


def occupied(place: Place) -> None:
    place.output.mkdir()
    (place.output / "checkpoint-5").mkdir()
    (place.output / "checkpoint-5" / "trainer_state.json").write_text("{}")


OUTPUTS = {
    "of another run": Case(occupied, "output_dir.*{output}"),
    "an evaluation into a folder": Case(
        lambda p: (p.output / "result.json").mkdir(parents=True), "{output}", "latro.evaluate"
    ),
    "an evaluation below a file": Case(
        lambda p: p.output.write_text("mine"), "{output}", "latro.evaluate"
    ),
    "an evaluation over the data": Case(
        lambda p: (
            p.data.rename(p.root / "data.json"),
            p.arguments.update(output=p.root / "data.json", dataset_name=p.root / "data.json"),
        ),
        "{root}/data.json",
        "latro.evaluate",
    ),
    "an evaluation over lines of no evaluation": Case(
        lambda p: (p.output.mkdir(), (p.output / "result.jsonl").write_text("{}\n")),
        "{output}/result.jsonl",
        "latro.evaluate",
    ),
    "an evaluation over lines of another": Case(
        lambda p: (
            p.output.mkdir(),
            (p.output / "result.jsonl").write_text("{}\n"),
            (p.output / "result.settings.json").write_text('{"model": {"dtype": "none"}}'),
        ),
        "{output}/result.jsonl is of another",
        "latro.evaluate",
    ),
    "an evaluation over damaged settings": Case(
        lambda p: (
            p.output.mkdir(),
            (p.output / "result.jsonl").write_text("{}\n"),
            (p.output / "result.settings.json").write_text('{"model'),
        ),
        "{output}/result.settings.json",
        "latro.evaluate",
    ),
    "a probe into text": Case(given(output="probe.txt"), "probe.txt", "latro.probe"),
}


@pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS)
def test_a_hostile_output_is_refused(
    case: Case, place: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    refused(case, place, warm, tmp_path / "printed")


def config(content: str | bytes) -> Callable[[Place], None]:
    raw = content.encode() if isinstance(content, str) else content

    def spoil(place: Place) -> None:
        (place.root / "run.yaml").write_bytes(raw)
        place.arguments["config"] = place.root / "run.yaml"

    return spoil


THIS = "--config: {root}/run.yaml"
SETTINGS = {
    "missing": Case(given(config="/nowhere/run.yaml"), "/nowhere/run.yaml"),
    "a folder": Case(lambda p: p.arguments.update(config=p.root), "--config.*{root}"),
    "no YAML": Case(config("a: b: c"), THIS, "latro.evaluate"),
    "not UTF-8": Case(config(b"seed: \xff"), THIS),
    "a NUL": Case(config("seed: \0"), THIS),
    "a list": Case(config("- seed"), THIS, "latro.probe"),
    "deep": Case(config("seed: " + "[" * 10**4), THIS),
    "aliases that multiply": Case(
        config("a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n"),
        THIS + ".*unknown argument",
    ),
    "an object": Case(config("seed: !!python/object/apply:os.getcwd []"), THIS),
    "an unknown argument": Case(config('"[/b]": 1'), THIS + r".*\[/b\]", "latro.sft"),
    "a name that is a number": Case(config("1: 2"), THIS),
    "a name that is a list": Case(config("? [a]\n: 2"), THIS),
    "a number in words": Case(config("seed: many"), THIS + ".*seed"),
    "a mapping for a number": Case(config("seed: {a: 1}"), THIS + ".*seed"),
}


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_hostile_settings_are_refused(
    case: Case, place: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    refused(case, place, warm, tmp_path / "printed")


@pytest.fixture
def of_a_server(place: Place, fake: FakeVllm) -> Place:
    place.arguments |= {"rollout_engine": "vllm", "vllm_url": fake.url}
    return place


def answers(path: str, status: int, content: Any) -> Callable[[FakeVllm], None]:
    return lambda fake: fake.answers.update({path: lambda body: (status, content)})


def samples(change: Callable[[dict[str, Any]], object]) -> Callable[[FakeVllm], None]:
    """Return a change of the fake server that spoils one of two completions."""

    def answer(body: Any) -> tuple[int, Any]:
        choices = [copy.deepcopy(choice(index, body)) for index in range(body["n"])]
        change(choices[1])
        return 200, {"choices": choices}

    return lambda fake: fake.answers.update({"/v1/completions": answer})


def count(number: int) -> Callable[[FakeVllm], None]:
    def answer(body: Any) -> tuple[int, Any]:
        return 200, {"choices": [choice(index, body) for index in range(number)]}

    return lambda fake: fake.answers.update({"/v1/completions": answer})


def speaks(content: bytes) -> Callable[[FakeVllm], None]:
    return lambda fake: fake.speaks.update({"/v1/models": lambda file: file.write(content)})


SERVERS: dict[str, tuple[Callable[[FakeVllm], object], str]] = {
    "not found": (answers("/v1/models", 404, {}), "{url} has no /v1/models"),
    "unauthorised": (answers("/v1/models", 401, {}), "{url}/v1/models refuses the request: 401"),
    "broken": (answers("/v1/models", 500, b"Traceback"), "{url}/v1/models: 500"),
    "elsewhere": (answers("/v1/models", 302, b""), "{url}/v1/models: 302"),
    "a page": (answers("/v1/models", 200, b"<html>"), "{url}/v1/models: expected JSON"),
    "half": (answers("/v1/models", 200, b'{"data": ['), "{url}/v1/models: expected JSON"),
    "no models": (answers("/v1/models", 200, {"data": []}), "{url}/v1/models: JSON of another"),
    "no HTTP": (speaks(b"SSH-2.0-OpenSSH\r\n"), "{url}/v1/models: the answer is no HTTP"),
    "closed": (speaks(b""), "{url}/v1/models: "),
    "cut": (speaks(HEAD + b"Content-Length: 99\r\n\r\n{"), "{url}/v1/models: "),
    "too old": (answers("/server_info?config_format=json", 404, {}), "{url} has no /server_info"),
    "another tokenizer": (answers("/tokenize", 200, {"tokens": [1]}), "{url} serves tiny"),
}
ROLLOUTS: dict[str, tuple[Callable[[FakeVllm], object], str]] = {
    "too few": (count(1), "gave 1 of 2 completions"),
    "too many": (count(3), "gave 3 of 2 completions"),
    "an id beyond": (
        samples(lambda c: c["token_ids"].append(0) or c.update(token_ids=[10**6] * 2)),
        "expected a token id below",
    ),
    "a negative id": (samples(lambda c: c.update(token_ids=[-1] * 2)), "expected a token id"),
    "a log-prob of NaN": (
        samples(lambda c: c["logprobs"].update(token_logprobs=[float("nan")] * 2)),
        "expected a finite log-prob",
    ),
    "too long": (
        samples(
            lambda c: (c.update(token_ids=[1] * 9), c["logprobs"].update(token_logprobs=[-1] * 9))
        ),
        "expected 1 to 4 tokens",
    ),
    "a failure": (answers("/v1/completions", 500, {"error": "EngineDeadError"}), "EngineDeadError"),
    "weights of another run": (answers("/weight_info", 200, {"weight_version": "x"}), "'x'"),
    "weights that it cannot load": (answers("/collective_rpc", 500, {"error": "oom"}), "500: oom"),
}


@pytest.mark.parametrize(("spoil", "told"), SERVERS.values(), ids=SERVERS)
def test_a_hostile_server_is_refused(
    spoil: Any, told: str, fake: FakeVllm, of_a_server: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    spoil(fake)
    case = Case(lambda p: None, f"vllm_url: .*{told.replace('{url}', fake.url)}")
    refused(case, of_a_server, warm, tmp_path / "printed")


@pytest.mark.parametrize(("spoil", "told"), ROLLOUTS.values(), ids=ROLLOUTS)
def test_a_hostile_rollout_ends_the_run(
    spoil: Any, told: str, fake: FakeVllm, of_a_server: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    spoil(fake)
    before = snapshot(of_a_server.root)
    case = Case(lambda p: None, f"{fake.url}.*{told}")
    told_in_one_line(case, of_a_server, warm, tmp_path / "printed")
    assert before.items() <= snapshot(of_a_server.root).items()
    assert not list((of_a_server.output / "vllm_weights").glob("*"))


URLS = {
    "nobody there": (lambda: f"http://127.0.0.1:{free_port()}", "refused"),
    "no URL": (lambda: "localhost", "expected http://HOST:PORT.*'localhost'"),
    "a password": (lambda: "http://user:hunter2@127.0.0.1:1", "without user, password"),
    "a port in words": (lambda: "http://127.0.0.1:http", "expected http://HOST:PORT"),
}


@pytest.mark.parametrize(("url", "told"), URLS.values(), ids=URLS)
def test_a_hostile_address_is_refused(
    url: Any, told: str, place: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    place.arguments |= {"rollout_engine": "vllm", "vllm_url": url()}
    refused(Case(lambda p: None, f"vllm_url: .*{told}"), place, warm, tmp_path / "printed")
    assert "hunter2" not in (tmp_path / "printed" / "stderr").read_text()

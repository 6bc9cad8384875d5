"""Answers that vLLM never gives are refused by name, in time, and without showing content."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

import pytest
from transformers import PreTrainedTokenizerBase

from latro.engines.vllm import VllmEngine
from latro.engines.vllm_client import LARGEST_ANSWER, Answer, Client
from tests.latro.fake_vllm import FakeVllm, choice

COMPLETIONS = "/v1/completions"
SECRET = "hunter2"


@pytest.fixture
def engine_of(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., VllmEngine]:
    def build(url: str, **options: Any) -> VllmEngine:
        settings = {"eos_token_ids": [0], "weights_dir": tmp_path / "weights"} | options
        return VllmEngine(url, tokenizer, **settings)

    return build


def generate(engine: VllmEngine, prompts: list[list[int]] | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_samples": 3, "max_new_tokens": 4, "temperature": 0.7}
    prompts = prompts or [[7, 8]]
    return engine.generate(prompts, seeds=list(range(len(prompts))), **(settings | options))


def good(body: Any) -> dict[str, Any]:
    return {"choices": [choice(index, body) for index in range(body["n"])]}


def with_(*keys: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a change of an answer that puts `value` at these keys."""

    def spoil(answer: dict[str, Any]) -> Any:
        part: Any = answer
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return answer

    return spoil


def without(*keys: Any) -> Callable[[dict[str, Any]], Any]:
    def spoil(answer: dict[str, Any]) -> Any:
        part: Any = answer
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        return answer

    return spoil


FIRST = ("choices", 1)
IDS, LOGPS = (*FIRST, "token_ids"), (*FIRST, "logprobs", "token_logprobs")
TOO_MANY = r"expected 1 to 4 tokens, a log-prob each, at .choices\[1\], got "
SAMPLES = {
    "a list": (lambda answer: [], "nothing at .choices"),
    "a text": (lambda answer: "choices", "nothing at .choices"),
    "null": (lambda answer: None, "nothing at .choices"),
    "no choices": (without("choices"), "nothing at .choices"),
    "choices by name": (with_("choices", value={"0": {}}), "expected list at .choices, got dict"),
    "too few": (lambda answer: {"choices": answer["choices"][:2]}, "gave 2 of 3 completions"),
    "none": (with_("choices", value=[]), "gave 0 of 3 completions"),
    "too many": (lambda a: {"choices": [*a["choices"], a["choices"][0]]}, "gave 4 of 3"),
    "one index twice": (with_(*FIRST, "index", value=0), "or two of one index"),
    "an index beyond": (with_(*FIRST, "index", value=3), "or two of one index"),
    "an index in words": (with_(*FIRST, "index", value="1"), r"expected int at .*\.index, got str"),
    "an index that is true": (with_(*FIRST, "index", value=True), "expected int at .* got bool"),
    "a choice that is none": (with_(*FIRST, value=None), r"nothing at .choices\[1\].index"),
    "no reason": (with_(*FIRST, "finish_reason", value=None), "expected str at .*finish_reason"),
    "another reason": (with_(*FIRST, "finish_reason", value="abort"), "was ended by 'abort'"),
    "no ids": (without(*IDS), r"nothing at .choices\[1\].token_ids"),
    "ids that are null": (with_(*IDS, value=None), "expected list at .*token_ids, got NoneType"),
    "a text of ids": (with_(*IDS, value="71"), "expected list at .*token_ids, got str"),
    "empty": (lambda a: with_(*IDS, value=[])(with_(*LOGPS, value=[])(a)), TOO_MANY + "0 and 0"),
    "too long": (
        lambda a: with_(*IDS, value=[1] * 5)(with_(*LOGPS, value=[-1.0] * 5)(a)),
        TOO_MANY + "5 and 5",
    ),
    "a negative id": (with_(*IDS, 0, value=-1), r"token id below \d+ at .*token_ids\[0\], got -1"),
    "an id beyond": (with_(*IDS, 0, value=10**6), "expected a token id below .* got 1000000"),
    "a huge id": (with_(*IDS, 0, value=10**300), "expected a token id below"),
    "a fractional id": (with_(*IDS, 0, value=7.0), r"expected int at .*token_ids\[0\], got float"),
    "an id that is true": (with_(*IDS, 0, value=True), "expected int at .* got bool"),
    "an id in words": (with_(*IDS, 0, value="7"), "expected int at .* got str"),
    "an id that is null": (with_(*IDS, 0, value=None), "expected int at .* got NoneType"),
    "no log-probs": (with_(*FIRST, "logprobs", value=None), "nothing at .*logprobs.token_logprobs"),
    "too few log-probs": (with_(*LOGPS, value=[-1.0]), TOO_MANY + "2 and 1 log-probs"),
    "too many log-probs": (with_(*LOGPS, value=[-1.0] * 3), TOO_MANY + "2 and 3 log-probs"),
    "a log-prob of nan": (with_(*LOGPS, 1, value=float("nan")), "expected a finite log-prob"),
    "a log-prob of inf": (with_(*LOGPS, 1, value=float("-inf")), "expected a finite log-prob"),
    "a huge log-prob": (with_(*LOGPS, 1, value=-(10**400)), "expected a finite log-prob"),
    "a probability over 1": (with_(*LOGPS, 1, value=0.5), "log-prob of at most 0 at .* got 0.5"),
    "a log-prob in words": (with_(*LOGPS, 1, value="-1"), "expected float at .* got str"),
    "a log-prob that is null": (with_(*LOGPS, 1, value=None), "expected float at .* got NoneType"),
    "a log-prob that is false": (with_(*LOGPS, 1, value=False), "expected float at .* got bool"),
}


@pytest.mark.parametrize(("spoil", "told"), SAMPLES.values(), ids=SAMPLES)
def test_samples_that_were_not_asked_for(
    fake: FakeVllm, engine_of: Any, spoil: Any, told: str
) -> None:
    engine = engine_of(fake.url)
    fake.answers[COMPLETIONS] = lambda body: (200, spoil(copy.deepcopy(good(body))))
    with pytest.raises(ConnectionError, match=rf"^{fake.url}{COMPLETIONS}: .*{told}") as caught:
        generate(engine)
    assert len(str(caught.value)) < 500


def test_what_was_asked_for_is_taken(fake: FakeVllm, engine_of: Any) -> None:
    """Ints are valid log-probs, and so are values that rounding raised slightly above 0."""
    engine = engine_of(fake.url, vocab_size=1000)
    spoil = with_(*LOGPS, value=[0, 1e-7])
    fake.answers[COMPLETIONS] = lambda body: (200, with_(*IDS, value=[999, 0])(spoil(good(body))))
    [group] = generate(engine)
    assert (group[1].ids, group[1].logp) == ([999, 0], [0.0, 1e-7])


def test_tokens_that_are_in_order_are_not_looked_at_one_by_one(
    fake: FakeVllm, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million tokens of an update took the host nine seconds."""
    engine = engine_of(fake.url, vocab_size=1000)
    steps: list[int] = []
    at = Answer.at

    def counted(answer: Answer, *keys: str | int) -> Answer:
        steps[-1] += 1
        return at(answer, *keys)

    monkeypatch.setattr(Answer, "at", counted)
    for length in (2, 60):
        spoil = with_(*IDS, value=[7] * length)
        more = with_(*LOGPS, value=[-0.5] * length)
        fake.answers[COMPLETIONS] = lambda body, f=spoil, g=more: (200, f(g(good(body))))
        steps.append(0)
        [group] = generate(engine, max_new_tokens=60)
        assert (group[1].ids, group[1].logp) == ([7] * length, [-0.5] * length)
    assert steps[0] == steps[1]


SHAPES = {
    "/v1/models": [{}, [], {"data": []}, {"data": [{"id": "m"}]}, {"data": [{"id": 1}]}, "m", None]
    + [{"data": [{"id": "m", "max_model_len": value}]} for value in (None, "64", True, 64.5)],
    "/server_info?config_format=json": [
        *({}, {"vllm_config": "a text"}, {"vllm_config": {"model_config": {}}}, None),
        {"vllm_config": {"model_config": {"logprobs_mode": 1}}},
        {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}},
    ],
    "/tokenize": [{}, [], {"tokens": None}, {"tokens": "1"}],
}


@pytest.mark.parametrize(
    ("path", "answer"), [(path, answer) for path, answers in SHAPES.items() for answer in answers]
)
def test_a_server_that_is_another_program(
    fake: FakeVllm, engine_of: Any, path: str, answer: Any
) -> None:
    fake.answers[path] = lambda body: (200, answer)
    with pytest.raises(
        ValueError, match=r"^vllm_url: .*: JSON of another shape than vLLM's: "
    ) as e:
        engine_of(fake.url)
    assert f"{fake.url}{path}" in str(e.value)


CONTENTS = {
    "a page": b"<html>" + SECRET.encode() + b"</html>",
    "nothing": b"",
    "half": b'{"choices": [{"text": "' + SECRET.encode(),
    "no UTF-8": b'"\xff"',
    "deep": b"[" * 200_000,
    "a long number": b"9" * 10_000,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_no_json(fake: FakeVllm, engine_of: Any, content: bytes) -> None:
    engine = engine_of(fake.url)
    fake.answers[COMPLETIONS] = lambda body: (200, content)
    told = f"{COMPLETIONS}: expected JSON, got {len(content):,} bytes of something else"
    with pytest.raises(ConnectionError, match=told) as caught:
        generate(engine)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("status", [204, 301, 307, 400, 401, 403, 404, 422, 429, 500, 502, 503])
@pytest.mark.parametrize("content", [b"", b"<html>hunter2</html>", b'{"body": "hunter2"}'])
def test_a_status_is_told_without_the_content(
    fake: FakeVllm, engine_of: Any, status: int, content: bytes
) -> None:
    engine = engine_of(fake.url)
    fake.answers[COMPLETIONS] = lambda body: (status, b"" if status == 204 else content)
    told = COMPLETIONS if status == 404 else f"{COMPLETIONS}.*: {status}"
    with pytest.raises(ValueError if 400 <= status < 500 else ConnectionError, match=told) as e:
        generate(engine)
    assert SECRET not in str(e.value)
    assert len(fake.of(COMPLETIONS)) == 1


@pytest.mark.parametrize(
    "stated",
    [
        {"error": {"message": "out of\nvocabulary", "type": "BadRequestError"}},
        {"object": "error", "message": "out of vocabulary", "input": SECRET},
        {"detail": "out of vocabulary"},
        {"error": "out of vocabulary" + " and" * 10_000},
    ],
)
def test_the_reason_that_a_server_states_is_told(
    fake: FakeVllm, engine_of: Any, stated: Any
) -> None:
    engine = engine_of(fake.url)
    fake.answers[COMPLETIONS] = lambda body: (400, stated)
    with pytest.raises(ValueError, match="refuses the request: 400: out of vocabulary") as caught:
        generate(engine)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 500


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip(start: bytes, piece: bytes) -> Callable[[BinaryIO], None]:
    """Send a byte now and then, each within any timeout of a single read."""

    def speak(file: BinaryIO) -> None:
        file.write(start)
        for _ in range(100):
            file.write(piece)
            file.flush()
            time.sleep(0.05)

    return speak


DRIPS = {
    "silence": lambda file: time.sleep(5),
    "status": drip(b"HTTP/1.1 200 ", b"O"),
    "headers": drip(HEAD, b"X-Wait: 1\r\n"),
    "one header": drip(HEAD + b"X-Wait: ", b"1"),
    "continues": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "content": drip(HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
    "chunks": drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "no length": drip(HEAD + b"\r\n", b" "),
}


@pytest.mark.parametrize("speak", DRIPS.values(), ids=DRIPS)
def test_the_limit_of_time_is_for_the_whole_request(
    fake: FakeVllm, engine_of: Any, speak: Any
) -> None:
    engine = engine_of(fake.url, timeout=0.3)
    fake.speaks[COMPLETIONS] = speak
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=f"{COMPLETIONS}: no answer in 0.3 seconds"):
        generate(engine)
    assert time.monotonic() - started < 2
    assert len(fake.of(COMPLETIONS)) == 1


BROKEN = {
    "a greeting": (lambda file: file.write(b"SSH-2.0-hunter2\r\n"), "the answer is no HTTP"),
    "an endless line": (lambda file: file.write(HEAD + b"X: " + b"a" * 10**5), "no HTTP"),
    "many headers": (lambda file: file.write(HEAD + b"X: a\r\n" * 500 + b"\r\n"), "no HTTP"),
    "closed": (lambda file: None, "closed connection"),
    "cut": (lambda file: file.write(HEAD + b"Content-Length: 10\r\n\r\n{"), "IncompleteRead"),
    "cut chunks": (
        lambda file: file.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"),
        "IncompleteRead",
    ),
}


@pytest.mark.parametrize(("speak", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_is_told_without_what_came(
    fake: FakeVllm, engine_of: Any, monkeypatch: Any, speak: Any, told: str
) -> None:
    monkeypatch.setattr("latro.engines.vllm_client.Hangup.wait", lambda self, seconds: None)
    engine = engine_of(fake.url)
    fake.speaks[COMPLETIONS] = speak
    with pytest.raises(ConnectionError, match=f"{COMPLETIONS}: .*{told}") as caught:
        generate(engine)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("framing", [b"\r\n", b"Content-Length: 99999999999\r\n\r\n"])
def test_an_answer_has_a_largest_size(fake: FakeVllm, engine_of: Any, framing: bytes) -> None:
    sent = 0

    def flood(file: BinaryIO) -> None:
        nonlocal sent
        file.write(HEAD + framing)
        while sent < 4 * LARGEST_ANSWER:
            sent += file.write(b" " * 2**20)

    engine = engine_of(fake.url)
    fake.speaks[COMPLETIONS] = flood
    with pytest.raises(ConnectionError, match=r"the answer has more than [\d,]+ bytes"):
        generate(engine)
    assert sent < 2 * LARGEST_ANSWER


def test_a_large_answer_that_was_asked_for_is_taken(fake: FakeVllm, engine_of: Any) -> None:
    def padded(body: Any) -> tuple[int, Any]:
        for_each_token = "x" * 900
        return 200, json.dumps(good(body) | {"text": [for_each_token] * 3 * 6000}).encode()

    fake.answers["/v1/models"] = lambda body: (
        200,
        {"data": [{"id": "tiny", "max_model_len": 10_000}]},
    )
    engine = engine_of(fake.url)
    fake.answers[COMPLETIONS] = padded
    assert len(generate(engine, max_new_tokens=6000)[0]) == 3


def test_the_first_failure_ends_the_others(fake: FakeVllm, engine_of: Any) -> None:
    """It cancels requests in progress, those that would be retried and those in the queue."""
    engine, release = engine_of(fake.url), Event()

    def one_fails(body: Any) -> tuple[int, Any]:
        if body["prompt"] != [3]:
            release.wait(30)
            return 200, good(body)
        while len(fake.of(COMPLETIONS)) < 200:
            time.sleep(0.01)
        return 500, {"error": "EngineDeadError"}

    fake.answers[COMPLETIONS] = one_fails
    started = time.monotonic()
    with pytest.raises(ConnectionError, match="500: EngineDeadError"):
        generate(engine, [[i % 200] for i in range(400)])
    assert time.monotonic() - started < 20
    # Of those that were sent some arrive later; the queue behind them is never sent.
    time.sleep(0.5)
    assert len(fake.of(COMPLETIONS)) <= 256
    release.set()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:8000",
        "http://hunter2@127.0.0.1:8000",
        "https://user:hunter2@[::1]:8000/path",
        "http://user:hun/hunter2@127.0.0.1:8000",
        "http://user:hunter2@127.0.0.1:port",
        "ftp://user:hunter2@127.0.0.1",
    ],
)
def test_a_password_is_refused_and_not_told(engine_of: Any, url: str) -> None:
    with pytest.raises(ValueError, match="vllm_url: expected http://HOST:PORT, without user") as e:
        engine_of(url)
    assert SECRET not in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:99999", "http://127.0.0.1:0", "http://127.0.0.1:port", "http://[::1"),
        *(
            "http://127.0.0.1:80/a b",
            "http://127.0.0.1:80/\n",
            "http://127.0.0.1?key=1",
            "http://é",
        ),
        *("http://127.0.0.1/#a", ""),
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="vllm_url: expected http://HOST:PORT"):
        Client(url)


def test_a_host_that_is_no_name() -> None:
    with pytest.raises(ConnectionError, match=r"http://a\.\.b:80/v1/models: "):
        Client("http://a..b:80").request("/v1/models", timeout=10)


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the url of a port that accepts connections and sends nothing, not even for TLS."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_port_that_says_nothing(silent: str, scheme: str) -> None:
    with pytest.raises(ConnectionError, match=r"/v1/models: no answer in 0.3 seconds"):
        Client(f"{scheme}://{silent}").request("/v1/models", timeout=0.3)


def test_tls_that_drips() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                # A handshake record of 16 KiB, sent byte by byte.
                connection.sendall(b"\x16\x03\x03\x40\x00")
                try:
                    for _ in range(60):
                        connection.sendall(b"\x02")
                        time.sleep(0.05)
                except OSError:
                    return

        thread = Thread(target=speak)
        thread.start()
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no answer in 0.3 seconds"):
            Client(f"https://127.0.0.1:{server.getsockname()[1]}").request("/x", timeout=0.3)
        assert time.monotonic() - started < 2
        thread.join()


def leftover(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def test_weights_of_a_killed_run_go_at_the_next_start(
    fake: FakeVllm, engine_of: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    left = [leftover(folder, "step-3-a1b2c3d4"), leftover(folder, "step-40-_x9y8z7w")]
    others = [leftover(folder, "checkpoint-3"), leftover(folder, "step-by-step")]
    (folder / "step-1-file").write_text("a file of the user's")
    elsewhere = leftover(tmp_path, "elsewhere")
    (folder / "step-5-link").symlink_to(elsewhere)
    engine_of(fake.url)
    assert not any(place.exists() for place in left)
    assert all((place / "model.safetensors").exists() for place in [*others, elsewhere])
    assert (folder / "step-1-file").exists()


def test_weights_of_a_run_that_lives_stay(
    fake: FakeVllm, engine_of: Any, tiny: Any, tmp_path: Path
) -> None:
    first = engine_of(fake.url)
    first.update_weights(tiny(), 1)
    under_way = leftover(tmp_path / "weights", "step-2-a1b2c3d4")
    second = engine_of(fake.url)
    assert under_way.exists()
    second.update_weights(tiny(), 1)
    del first, second
    engine_of(fake.url)
    assert not under_way.exists()


def test_where_folders_have_no_locks_nothing_is_removed(
    fake: FakeVllm, engine_of: Any, tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = leftover(tmp_path / "weights", "step-2-a1b2c3d4")
    engine_of(fake.url).update_weights(tiny(), 1)
    assert left.exists()
    assert len(fake.loaded) == 1


def test_a_weights_folder_that_is_a_file(fake: FakeVllm, engine_of: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match=r"vllm_weights_dir: expected a folder, got .*weights"):
        engine_of(fake.url)


def test_no_connection_is_left_open(fake: FakeVllm, engine_of: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    engine = engine_of(fake.url)
    for _ in range(5):
        generate(engine)
    fake.speaks[COMPLETIONS] = drip(b"", b"H")
    engine.timeout = 0.1
    with pytest.raises(ConnectionError):
        generate(engine)
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_request_that_moves_the_server_on_is_sent_once(fake: FakeVllm) -> None:
    fake.drop = 1
    with pytest.raises(ConnectionError):
        Client(fake.url).request("/start_weight_update", {}, timeout=10, attempts=1)
    assert fake.of("/start_weight_update") == [{}]


def test_nccl_needs_a_server_that_was_started_for_it(fake: FakeVllm, engine_of: Any) -> None:
    def info(device: str, transfer: Any) -> Callable[[Any], tuple[int, Any]]:
        config = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "device_config": {"device": device},
            "weight_transfer_config": transfer,
        }
        return lambda body: (200, {"vllm_config": config})

    path = "/server_info?config_format=json"
    for transfer in (None, {"backend": "ipc"}):
        fake.answers[path] = info("cuda", transfer)
        with pytest.raises(ValueError, match=r"vllm_sync: .* takes no weights over NCCL"):
            engine_of(fake.url, weights_dir=None)
    fake.answers[path] = info("cpu", {"backend": "nccl"})
    with pytest.raises(ValueError, match="vllm_sync: expected files with a server on a CPU, got"):
        engine_of(fake.url, weights_dir=None)


def test_the_server_pauses_while_weights_come_over_nccl(
    fake: FakeVllm, engine_of: Any, tiny: Any
) -> None:
    fake.answers |= {path: lambda body: (200, {}) for path in ("/pause?mode=wait", "/resume")}
    engine = engine_of(fake.url)
    engine.weights_dir = None
    engine._hand_over = lambda model, step, weights, request: request("/weight_info")
    fake.asked.clear()
    engine.update_weights(tiny(), 3)
    assert [path for path, _ in fake.asked] == [
        *("/pause?mode=wait", "/weight_info", "/reset_prefix_cache"),
        *("/update_weight_version", "/resume"),
    ]
    assert fake.version.endswith("-3")

"""Rollouts one update ahead: which weights draw them, and that a resumed run is the same run."""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from latro import LatroConfig, LatroTrainer
from latro.engines.ahead import ROLLOUTS_FILE, Lookahead
from latro.engines.transformers import seed_of
from latro.train import train
from tests.latro.fake_vllm import FakeVllm

COMPLETIONS, LOAD = "/v1/completions", "/collective_rpc"
SEED = 42
UPDATES, PLACES = 16, 4
LONGEST = 8
"""Tokens of a rationale, at most, in these tests."""
NO_SERVER = LatroConfig.vllm_url
"""The address that settings have where nobody named one."""


class Server:
    """Makes a fake draw samples that depend on its weights and the seed, and watches the order.

    Attributes:
        drawn: the update that each request was for, and the update that made the weights.
        under_way: number of requests that are being answered.
        replaced_under_way: whether weights were replaced while there were some.
        before_answer: called with the update that a request is for, before it is answered.
    """

    def __init__(self, fake: FakeVllm) -> None:
        self.fake = fake
        self.drawn: list[tuple[int, int]] = []
        self.under_way = 0
        self.replaced_under_way = False
        self.before_answer: Callable[[int], None] = lambda update: None
        self.lock = threading.Lock()
        self.updates = {
            Random(seed_of(SEED, update, place)).getrandbits(62): update
            for update in range(UPDATES)
            for place in range(PLACES)
        }
        fake.answers |= {COMPLETIONS: self.complete, LOAD: self.load}

    def load(self, body: Any) -> tuple[int, Any]:
        self.replaced_under_way |= self.under_way > 0
        return 200, {"results": [None]}

    def complete(self, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.under_way += 1
        weights = int(self.fake.version.rpartition("-")[2])
        # An evaluation's completions may be longer; some of its seeds are those of updates.
        update = self.updates[body["seed"]] if body["max_tokens"] <= LONGEST else None
        try:
            if update is not None:
                self.before_answer(update)
                self.drawn.append((update, weights))
            numbers = random.Random(f"{weights} {body['seed']}")
            choices = []
            for index in range(body["n"]):
                ids = [numbers.randint(20, 300) for _ in range(numbers.randint(1, 5))]
                ids.append(self.fake.tokenizer.eos_token_id)
                logps = [-6 - numbers.random() for _ in ids]
                choices.append(
                    {
                        "index": index,
                        "token_ids": ids,
                        "logprobs": {"token_logprobs": logps},
                        "finish_reason": "stop",
                    }
                )
            return 200, {"choices": choices}
        finally:
            with self.lock:
                self.under_way -= 1

    def weights_of_updates(self) -> dict[int, int]:
        """Return the weights that drew each update's samples; a set of one for every update."""
        found = {update: {w for u, w in self.drawn if u == update} for update, _ in self.drawn}
        assert all(len(weights) == 1 for weights in found.values()), found
        return {update: weights.pop() for update, weights in sorted(found.items())}


@pytest.fixture
def server(fake: FakeVllm) -> Server:
    return Server(fake)


@pytest.fixture
def make(make_trainer: Any, server: Server, tmp_path: Path) -> Callable[..., LatroTrainer]:
    """Return a maker of trainers on eight problems, two an update: an epoch has four updates."""

    def build(name: str = "run", **settings: Any) -> LatroTrainer:
        settings = {
            "output_dir": str(tmp_path / name),
            "rollout_engine": "vllm",
            "vllm_url": server.fake.url,
            "async_rollouts": 1,
            "importance_cap": 2.0,
            "seed": SEED,
            "max_steps": 6,
            **settings,
        }
        return make_trainer(**settings)

    return build


def weights_of(trainer: LatroTrainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def at_step_end(act: Callable[[int], None]) -> TrainerCallback:
    class Acting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            act(state.global_step)

    return Acting()


def test_a_lookahead_sees_what_it_gives_later() -> None:
    ahead = Lookahead(iter(range(5)))
    assert ahead.peek(2) == [0, 1]
    assert ahead.peek(3) == [0, 1, 2]
    assert [next(ahead), next(ahead)] == [0, 1]
    assert ahead.peek(9) == [2, 3, 4]
    assert list(ahead) == [2, 3, 4]
    assert ahead.peek(1) == []


def test_weights_one_update_old_draw_but_for_an_epochs_first_update(
    make: Any, server: Server
) -> None:
    trainer = make()
    trainer.train()
    assert server.weights_of_updates() == {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 4}
    history = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert len(history) == 6
    waiting = Server(server.fake)
    make("other", async_rollouts=0).train()
    assert waiting.weights_of_updates() == {update: update for update in range(6)}


def test_accumulation_and_evaluations_do_not_change_which_weights_draw(
    make: Any, server: Server
) -> None:
    server.before_answer = lambda update: time.sleep(0.02)
    make(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    ).train()
    assert server.weights_of_updates() == {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 4}
    assert not server.replaced_under_way


def test_the_server_samples_while_the_update_is_computed(make: Any, server: Server) -> None:
    ended = {step: threading.Event() for step in range(1, 4)}

    def wait(update: int) -> None:
        # The second update's rollouts end only after the first update, and so on.
        if update:
            assert ended[update].wait(30)

    server.before_answer = wait
    trainer = make(max_steps=4, num_generations=2)
    trainer.add_callback(at_step_end(lambda step: step < 4 and ended[step].set()))
    trainer.train()
    assert trainer.state.global_step == 4
    assert not server.replaced_under_way


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    make: Any, server: Server, accumulation: int
) -> None:
    settings = {
        "per_device_train_batch_size": 2 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    whole = make("whole", **settings)
    whole.train()
    saving = make("saving", save_strategy="steps", save_steps=1, **settings)
    saving.train()
    assert_same(weights_of(saving), weights_of(whole))
    folder = Path(saving.args.output_dir)
    # At an epoch's end, and the run's, no rollout is under way.
    held = [s for s in range(1, 7) if (folder / f"checkpoint-{s}" / ROLLOUTS_FILE).exists()]
    assert held == [1, 2, 3, 5]
    for step in (1, 3, 4, 5):
        resumed = make("saving", **settings)
        asked = Server(server.fake)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same(weights_of(resumed), weights_of(whole))
        assert min(asked.weights_of_updates(), default=6) == step + (step in held)


def test_a_signal_ends_the_run_with_the_rollouts_that_are_under_way(
    make: Any, server: Server
) -> None:
    whole = make("whole")
    whole.train()
    stopped = make("stopped")
    stopped.add_callback(
        at_step_end(lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    )
    stopped.train()
    step = stopped.state.global_step
    assert step < 6
    held = Path(stopped.args.output_dir) / f"checkpoint-{step}" / ROLLOUTS_FILE
    states = json.loads(held.read_text())
    assert [state["place"] for state in states] == [0, 1]
    resumed = make("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights_of(resumed), weights_of(whole))


def test_rollouts_of_other_prompts_are_refused(make: Any, server: Server) -> None:
    trainer = make(save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    path = checkpoint / ROLLOUTS_FILE
    path.write_text(path.read_text().replace('"place": 0', '"place": 7'))
    with pytest.raises(ValueError, match=f"next prompts in its {ROLLOUTS_FILE}, got those of"):
        make(max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    path.write_text("[")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{ROLLOUTS_FILE} cannot be"):
        make(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_failure_in_the_background_is_told_at_the_next_update(make: Any, server: Server) -> None:
    def fail(update: int) -> None:
        if update == 2:
            server.fake.answers[COMPLETIONS] = lambda body: (500, {"error": "it broke"})
            raise ConnectionResetError

    server.before_answer = fail
    trainer = make()
    with pytest.raises(ConnectionError, match=rf"{COMPLETIONS}: 500: it broke"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_server_that_failed_takes_no_checkpoint_with_it(
    make: Any, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(max_steps=2, save_strategy="steps", save_steps=1)
    working = server.fake.answers[COMPLETIONS]

    def fail(update: int) -> None:
        if update == 1:
            server.fake.answers[COMPLETIONS] = lambda body: (500, {"error": "it broke"})
            raise ConnectionResetError

    server.before_answer = fail
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError, match="it broke"):
        trainer.train()
    assert "checkpoint-1 is without rollouts of the next update: " in caplog.text
    server.fake.answers[COMPLETIONS] = working
    server.before_answer = lambda update: None
    resumed = make(max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert server.weights_of_updates() == {0: 0, 1: 1}


def test_an_interrupted_run_leaves_no_request_behind(make: Any, server: Server) -> None:
    release = threading.Event()

    def hang(update: int) -> None:
        if update == 1:
            release.wait(30)

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    server.before_answer = hang
    trainer = make()
    trainer.add_callback(at_step_end(interrupt))
    before = set(threading.enumerate())
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        deadline = time.monotonic() + 10
        ours = [t for t in set(threading.enumerate()) - before if t.name.startswith("rollouts")]
        for thread in ours:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in ours)
    finally:
        release.set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"async_rollouts": 2}, "async_rollouts: expected 0 or 1, got 2"),
        ({"async_rollouts": -1}, "async_rollouts: expected 0 or 1, got -1"),
        (
            {"rollout_engine": "transformers", "vllm_url": NO_SERVER, "importance_cap": None},
            "async_rollouts: expected rollout_engine='vllm' and .*; got 'transformers' and",
        ),
        ({"importance_cap": None}, "async_rollouts: expected importance_cap with 1, .*; got none"),
        ({"ignore_data_skip": True}, "ignore_data_skip: expected false with async_rollouts 1"),
    ],
)
def test_bad_settings(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.long
def test_two_processes_are_one_run(
    server: Server, warm: Any, small_tokenizer: Any, tmp_path: Path
) -> None:
    """The last of an epoch's three updates has one prompt, and one process has none."""
    server.fake.tokenizer = small_tokenizer
    options = [
        *("--dataset_name", "arithmetic", "--num_train_examples", "9", "--max_steps", "5"),
        *("--num_generations", "2", "--max_completion_length", "8", "--disable_tqdm", "true"),
        *("--learning_rate", "1e-3", "--use_cpu", "true", "--eval_strategy", "no"),
        *("--eval_on_start", "false", "--num_eval_examples", "2", "--seed", str(SEED)),
        *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9"),
        *("--rollout_engine", "vllm", "--vllm_url", server.fake.url),
        *("--async_rollouts", "1", "--importance_cap", "2"),
    ]
    prompts = "--per_device_train_batch_size"
    models = {"data": [{"id": "small", "max_model_len": 1024}]}
    server.fake.answers["/v1/models"] = lambda body: (200, models)
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    train([*options, prompts, "4", "--output_dir", str(one)])
    expected = {0: 0, 1: 0, 2: 1, 3: 3, 4: 3}
    assert server.weights_of_updates() == expected
    server.drawn.clear()
    argv = [*options, prompts, "2", "--output_dir", str(two)]
    warm.run_together("latro.train", argv, tmp_path / "printed", processes=2)
    assert server.weights_of_updates() == expected
    assert not server.replaced_under_way
    server.drawn.clear()
    train(
        [
            *(*options, prompts, "4", "--output_dir", str(resumed)),
            *("--resume_from_checkpoint", str(two / "checkpoint-4")),
        ]
    )
    assert server.drawn == []
    theirs = load_file(one / "model.safetensors")
    for output in (two, resumed):
        for name, tensor in load_file(output / "model.safetensors").items():
            # As between the processes of test_distributed.py.
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5, msg=name)

"""Requests, answers and errors against a small server here; training against a real vLLM.

The real one runs where the environment variable LATRO_VLLM_PYTHON names the Python of an
environment that has vLLM, which need not be this one.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from latro import LatroConfig, LatroTrainer
from latro.rollout import Sample, decode
from latro.vllm_engine import VllmEngine
from scripts.make_tiny_model import make_model
from tests.latro.fake_vllm import FakeVllm, choice
from tests.latro.real_vllm import free_port, serve

TEMPLATE = "The answer is"


@pytest.fixture
def engine_of(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., VllmEngine]:
    def build(url: str, **options: Any) -> VllmEngine:
        settings = {"eos_token_ids": [0], "weights_dir": tmp_path / "weights"} | options
        return VllmEngine(url, tokenizer, **settings)

    return build


def generate(engine: VllmEngine, prompts: list[list[int]], **options: Any) -> list[list[Sample]]:
    settings = {"num_samples": 3, "max_new_tokens": 20, "temperature": 0.7, "template": TEMPLATE}
    return engine.generate(prompts, seeds=list(range(len(prompts))), **(settings | options))


def test_request_asks_for_the_whole_distribution(fake: FakeVllm, engine_of: Any) -> None:
    generate(engine_of(fake.url), [[7, 8, 9], [4]])
    bodies = sorted(fake.of("/v1/completions"), key=lambda body: len(body["prompt"]))
    assert [body["prompt"] for body in bodies] == [[4], [7, 8, 9]]
    for body in bodies:
        seed = body.pop("seed")
        del body["prompt"]
        assert 0 <= seed < 2**62
        assert body == {
            "model": "tiny",
            "n": 3,
            "max_tokens": 20,
            "temperature": 0.7,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": [TEMPLATE],
            "stop_token_ids": [0],
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }


def test_seeds_are_reproducible_and_far_apart(fake: FakeVllm, engine_of: Any) -> None:
    engine = engine_of(fake.url)
    for _ in range(2):
        for seeds in ([5, 6], [2**63 - 1, 6]):
            engine.generate(
                [[1], [2]], num_samples=2, max_new_tokens=4, temperature=1.0, seeds=seeds
            )
    asked = [
        {body["prompt"][0]: body["seed"] for body in fake.of("/v1/completions")[i : i + 2]}
        for i in range(0, 8, 2)
    ]
    assert asked[:2] == asked[2:]
    # The server adds the sample's index to the seed.
    assert len({asked[0][1], asked[0][2], asked[1][1]}) == 3
    assert abs(asked[0][1] - asked[0][2]) > 10_000


def test_ragged_samples_come_back_in_order(fake: FakeVllm, engine_of: Any) -> None:
    prompts = [[i] for i in range(5, 15)]
    assert generate(engine_of(fake.url), prompts) == [
        [
            Sample([i], [-0.5 * i]),
            Sample([i, 1], [-0.5 * i, -0.5]),
            Sample([i, 2, 2], [-0.5 * i, -1.0, -1.0]),
        ]
        for i in range(5, 15)
    ]


def test_temperature_0_has_no_log_probs(fake: FakeVllm, engine_of: Any) -> None:
    [group] = generate(engine_of(fake.url), [[5]], temperature=0.0, template=None)
    assert [sample.logp for sample in group] == [None] * 3
    assert fake.of("/v1/completions")[0]["stop"] == []


def test_no_prompts(fake: FakeVllm, engine_of: Any) -> None:
    assert generate(engine_of(fake.url), []) == []


def test_prompts_are_under_way_together(fake: FakeVllm, engine_of: Any) -> None:
    def wait_for_all(body: Any) -> tuple[int, Any]:
        deadline = time.monotonic() + 10
        while len(fake.of("/v1/completions")) < 8:
            if time.monotonic() > deadline:
                return 500, {"error": "the others did not come"}
            time.sleep(0.01)
        return 200, {"choices": [choice(j, body) for j in range(body["n"])]}

    fake.answers["/v1/completions"] = wait_for_all
    assert len(generate(engine_of(fake.url), [[i] for i in range(8)])) == 8


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_url_that_is_none(engine_of: Any, url: str) -> None:
    with pytest.raises(ValueError, match=r"vllm_url: expected http://HOST:PORT"):
        engine_of(url)


def test_no_server(engine_of: Any) -> None:
    port = free_port()
    with pytest.raises(ValueError, match=rf"vllm_url: http://127.0.0.1:{port}.*vllm serve MODEL"):
        engine_of(f"http://127.0.0.1:{port}")


def test_server_without_the_dev_routes(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/server_info?config_format=json"] = lambda body: (404, {"detail": "Not Found"})
    with pytest.raises(ValueError, match=r"has no /server_info.*VLLM_SERVER_DEV_MODE=1"):
        engine_of(fake.url)


def test_server_that_is_not_vllm(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/v1/models"] = lambda body: (200, b"<html>hello</html>")
    with pytest.raises(ValueError, match=r"vllm_url.*<html>hello"):
        engine_of(fake.url)


def test_server_with_raw_log_probs(fake: FakeVllm, engine_of: Any) -> None:
    fake.logprobs_mode = "raw_logprobs"
    with pytest.raises(ValueError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        engine_of(fake.url)


def test_server_with_another_tokenizer(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/tokenize"] = lambda body: (200, {"tokens": [1, 2]})
    with pytest.raises(ValueError, match=r"tokenizer is not the policy's.*\[1, 2\] there"):
        engine_of(fake.url)


def test_prompt_too_long_for_the_server(fake: FakeVllm, engine_of: Any) -> None:
    with pytest.raises(ValueError, match=r"takes 64 tokens.*--max-model-len 65"):
        generate(engine_of(fake.url), [[1], [1] * 45])
    assert not fake.of("/v1/completions")


def test_seeds_one_a_prompt(fake: FakeVllm, engine_of: Any) -> None:
    with pytest.raises(ValueError, match=r"seeds: expected 2, one a prompt, got 1"):
        engine_of(fake.url).generate(
            [[1], [2]], num_samples=1, max_new_tokens=1, temperature=1.0, seeds=[1]
        )


def test_refused_request(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/v1/completions"] = lambda body: (400, {"error": "out of vocabulary"})
    with pytest.raises(ValueError, match=r"/v1/completions refuses.*400.*out of vocabulary"):
        generate(engine_of(fake.url), [[1]])


def test_server_that_fails(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/v1/completions"] = lambda body: (500, {"error": "EngineDeadError"})
    with pytest.raises(ConnectionError, match=r"/v1/completions: 500.*EngineDeadError"):
        generate(engine_of(fake.url), [[1], [2]])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choices: choices[:-1],
        lambda choices: [*choices[:-1], choices[-1] | {"finish_reason": "abort"}],
    ],
    ids=["missing", "aborted"],
)
def test_incomplete_completions(fake: FakeVllm, engine_of: Any, spoil: Any) -> None:
    fake.answers["/v1/completions"] = lambda body: (
        200,
        {"choices": spoil([choice(j, body) for j in range(body["n"])])},
    )
    with pytest.raises(ConnectionError, match=r"of 3 completions"):
        generate(engine_of(fake.url), [[1]])


def test_broken_connection_is_tried_again(fake: FakeVllm, engine_of: Any) -> None:
    engine = engine_of(fake.url)
    fake.drop = 1
    assert len(generate(engine, [[1]])) == 1
    assert len(fake.of("/v1/completions")) == 2


def test_timeout(fake: FakeVllm, engine_of: Any) -> None:
    def late(body: Any) -> tuple[int, Any]:
        time.sleep(1)
        return 200, {}

    engine = engine_of(fake.url, timeout=0.2)
    fake.answers["/v1/completions"] = late
    with pytest.raises(ConnectionError, match=r"/v1/completions: no answer in 0.2 seconds"):
        generate(engine, [[1]])
    assert len(fake.of("/v1/completions")) == 1


def test_weights_lie_there_while_the_server_loads_them(
    fake: FakeVllm, engine_of: Any, tiny: Any, tmp_path: Path
) -> None:
    engine = engine_of(fake.url)
    engine.update_weights(tiny(), 3)
    [names] = fake.loaded
    assert "model.safetensors" in names
    assert list((tmp_path / "weights").iterdir()) == []
    assert fake.of("/collective_rpc")[0]["method"] == "reload_weights"
    paths = [path for path, _ in fake.asked[-3:]]
    assert paths == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert fake.version.endswith("-3")
    assert len(generate(engine, [[1]])) == 1


def test_server_that_lost_the_weights(fake: FakeVllm, engine_of: Any, tiny: Any) -> None:
    engine = engine_of(fake.url)
    engine.update_weights(tiny(), 1)
    fake.version = "default"
    with pytest.raises(ValueError, match=r"has the weights 'default' and not.*restarted"):
        generate(engine, [[1]])


def test_another_run_on_the_same_server(fake: FakeVllm, engine_of: Any, tiny: Any) -> None:
    ours, other = engine_of(fake.url), engine_of(fake.url)
    ours.update_weights(tiny(), 1)
    other.update_weights(tiny(), 1)
    with pytest.raises(ValueError, match=r"another run uses it"):
        generate(ours, [[1]])
    assert len(generate(other, [[1]])) == 1


def test_weights_that_cannot_be_loaded(fake: FakeVllm, engine_of: Any, tiny: Any) -> None:
    engine = engine_of(fake.url)
    fake.answers["/collective_rpc"] = lambda body: (500, {"error": "no such shape"})
    with pytest.raises(ConnectionError, match=r"no such shape.*could not load.*Start it anew"):
        engine.update_weights(tiny(), 1)


def test_prefix_cache_in_use(fake: FakeVllm, engine_of: Any, tiny: Any) -> None:
    engine = engine_of(fake.url)
    fake.answers["/reset_prefix_cache"] = lambda body: (200, {"success": False})
    with pytest.raises(ConnectionError, match=r"kept its prefix cache"):
        engine.update_weights(tiny(), 1)


# A real vLLM. Its attention takes heads of 32 or more on a CPU.

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def vllm_url(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: Any) -> Iterator[str]:
    """The server of a tiny Llama whose own generation config would cut the distribution."""
    python = os.environ.get("LATRO_VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM: LATRO_VLLM_PYTHON names no Python that has it")
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model("llama", tokenizer, **SIZES)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.1, repetition_penalty=1.5
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with serve(python, folder / "model", folder / "log") as url:
        yield url


def log_probs(
    model: PreTrainedModel, prompt: list[int], ids: list[int], temperature: float
) -> torch.Tensor:
    """Of `ids` after `prompt`, from all logits, in the model's dtype."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0].double()


def errors(
    model: PreTrainedModel, prompts: list[list[int]], groups: list[list[Sample]], temperature: float
) -> tuple[float, float]:
    """The engine's largest error against fp64, and the most that it may be."""
    exact = copy.deepcopy(model).double()
    engine = unfused = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            truth = log_probs(exact, prompt, sample.ids, temperature)
            plain = log_probs(model, prompt, sample.ids, temperature)
            engine = max(engine, (torch.tensor(sample.logp) - truth).abs().max().item())
            unfused = max(unfused, (plain - truth).abs().max().item())
    return engine, 2 * unfused + 1e-5


def test_vllm_samples_the_whole_distribution_of_the_weights_it_got(
    vllm_url: str, engine_of: Any, tiny: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode(f"Tom has {n} pens.") for n in range(8)]
    served, other = tiny(**SIZES), tiny(seed=1, **SIZES)
    engine = engine_of(vllm_url)
    for step, (now, not_now) in enumerate([(served, other), (other, served)]):
        engine.update_weights(now, step)
        groups = generate(engine, prompts, num_samples=16, max_new_tokens=60, template="e")
        error, allowed = errors(now, prompts, groups, temperature=0.7)
        assert error <= allowed
        assert errors(not_now, prompts, groups, temperature=0.7)[0] > 100 * allowed


def test_vllm_ends_a_sample_where_its_text_shows_the_template(
    vllm_url: str, engine_of: Any, tiny: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode(f"Tom has {n} pens.") for n in range(8)]
    ends = [0, *tokenizer.encode("012345")]
    engine = engine_of(vllm_url, eos_token_ids=ends)
    engine.update_weights(tiny(**SIZES), 0)
    # Some tokens hold it in their middle: " pens", " gets".
    groups = generate(engine, prompts, num_samples=16, max_new_tokens=60, template="e")
    endings = {"template": 0, "middle": 0, "eos": 0, "length": 0}
    for sample in (sample for group in groups for sample in group):
        text, before = decode(tokenizer, sample.ids), decode(tokenizer, sample.ids[:-1])
        assert "e" not in before
        assert not set(ends) & set(sample.ids[:-1])
        if "e" in text:
            endings["template"] += 1
            endings["middle"] += not text.endswith("e")
        elif sample.ids[-1] in ends:
            endings["eos"] += 1
        else:
            assert len(sample.ids) == 60
            endings["length"] += 1
    assert all(endings.values()), endings


def test_training_samples_from_the_updated_policy(
    vllm_url: str, tiny: Any, tokenizer: Any, task: Any, dataset: Any, tmp_path: Path
) -> None:
    settings = LatroConfig(
        output_dir=str(tmp_path / "run"),
        rollout_engine="vllm",
        vllm_url=vllm_url,
        importance_cap=2.0,
        num_generations=4,
        max_completion_length=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=2,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = LatroTrainer(tiny(**SIZES), settings, dataset, tokenizer, task)
    drawn = []
    engine_generate = trainer.engine.generate

    def generate(prompts: list[list[int]], **options: Any) -> list[list[Sample]]:
        groups = engine_generate(prompts, **options)
        drawn.append((copy.deepcopy(trainer.model), prompts, groups))
        return groups

    trainer.engine.generate = generate
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert len(drawn) == len(history) == 2
    for (model, prompts, groups), logged in zip(drawn, history, strict=True):
        error, allowed = errors(model, prompts, groups, temperature=1.0)
        assert error <= allowed
        # Engine and trainer are each within the gate of the truth.
        for name in ("importance_ratio", "importance_ratio_max"):
            assert abs(math.log(logged[name])) <= 2 * allowed
    initial, (_, prompts, groups) = drawn[0][0], drawn[1]
    assert errors(initial, prompts, groups, temperature=1.0)[0] > 100 * allowed

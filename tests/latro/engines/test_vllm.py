"""Requests, answers and errors of `VllmEngine`, with a small server that answers as vLLM does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from latro.engines.vllm import VllmEngine
from latro.rollout.answer_template import stop_strings
from latro.rollout.sequences import Sample
from tests.latro.fake_vllm import FakeVllm, choice
from tests.warm_process import free_port

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
            "stop": stop_strings(TEMPLATE),
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
    with pytest.raises(
        ValueError, match=r"vllm_url.*/v1/models: expected JSON, got 18 bytes of something else"
    ):
        engine_of(fake.url)


def test_server_with_raw_log_probs(fake: FakeVllm, engine_of: Any) -> None:
    fake.logprobs_mode = "raw_logprobs"
    with pytest.raises(ValueError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        engine_of(fake.url)


def test_server_on_a_cpu_reads_prompts_whole(fake: FakeVllm, engine_of: Any) -> None:
    fake.device = "cpu"
    with pytest.raises(ValueError, match="serve with --no-enable-chunked-prefill"):
        engine_of(fake.url)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_not_updated_on_a_cpu(
    fake: FakeVllm, engine_of: Any, tiny: Any, device: str, tied: bool
) -> None:
    fake.device, fake.chunked_prefill = device, False
    engine, model = engine_of(fake.url), tiny(tie_word_embeddings=tied)
    if tied and device == "cpu":
        with pytest.raises(ValueError, match="keeps the old head of a model whose embeddings"):
            engine.update_weights(model, 1)
        assert not fake.loaded
    else:
        engine.update_weights(model, 1)
        assert len(fake.loaded) == 1


def test_server_with_another_tokenizer(fake: FakeVllm, engine_of: Any) -> None:
    fake.answers["/tokenize"] = lambda body: (200, {"tokens": [1, 2]})
    with pytest.raises(ValueError, match=r"tokenizer is not the policy's.*\[1, 2\] there"):
        engine_of(fake.url)


def test_prompt_too_long_for_the_server(fake: FakeVllm, engine_of: Any) -> None:
    with pytest.raises(ValueError, match=r"takes 64 tokens.*--max-model-len 65"):
        generate(engine_of(fake.url), [[1], [1] * 45])
    assert not fake.of("/v1/completions")


def test_seeds_one_a_prompt(fake: FakeVllm, engine_of: Any) -> None:
    with pytest.raises(ValueError, match=r"seeds: expected 2, one per prompt, got 1"):
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


def test_adapters_are_merged_into_what_the_server_loads(
    fake: FakeVllm, engine_of: Any, tiny: Any
) -> None:
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny(), settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = {}

    def load(body: Any) -> tuple[int, Any]:
        got.update(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
        return 200, {"results": [None]}

    fake.answers["/collective_rpc"] = load
    engine_of(fake.url).update_weights(model, 1)
    plain = dict(tiny().state_dict())
    assert got.keys() == plain.keys()
    for name, value in plain.items():
        if "q_proj" in name:
            layer = "base_model.model." + name.removesuffix(".weight")
            down, up = (before[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            truth = value.double() + 3 * up @ down
            unfused = (value + 3 * (up.float() @ down.float()) - truth).abs().max()
            assert (got[name] - truth).abs().max() <= 2 * unfused + 1e-5
            assert (got[name] - value).abs().max() > 1e-3
        else:
            assert torch.equal(got[name], value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_the_server_loads_is_the_policy_or_it_gets_nothing(
    fake: FakeVllm, engine_of: Any, tiny: Any, options: dict[str, Any], tied: bool
) -> None:
    model = get_peft_model(tiny(tie_word_embeddings=tied), LoraConfig(r=2, **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.arange(1, 20)[None]
    loaded = []

    def load(body: Any) -> tuple[int, Any]:
        # A server builds its model by its own config, which is the base model's.
        served = tiny(tie_word_embeddings=tied).eval()
        weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        served.load_state_dict(weights, strict=not tied)
        loaded.append(served(input_ids=ids).logits)
        return 200, {"results": [None]}

    fake.answers["/collective_rpc"] = load
    engine = engine_of(fake.url)
    on_it = "q_proj" not in options["target_modules"] or "modules_to_save" in options
    keeps = options.get("ensure_weight_tying") and "modules_to_save" in options
    if tied and on_it and not keeps:
        with pytest.raises(ValueError, match=r"rollout_engine: expected head and embedding to be"):
            engine.update_weights(model, 1)
        assert not loaded
        return
    engine.update_weights(model, 1)
    torch.testing.assert_close(loaded[0], model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


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

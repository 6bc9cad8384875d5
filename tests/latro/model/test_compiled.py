"""Decoding steps that torch compiles."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch._dynamo.utils import counters

from latro.config.engine import EngineArguments
from latro.engines.cast import CastEngine
from latro.engines.make import make_engine
from latro.engines.transformers import TransformersEngine
from latro.model import compiled
from tests.latro.compiled import traced_only
from tests.latro.other_models import other_model

PROMPTS = ["Tom has 9 pens. Tom gets 12. How many?", "Tom has 3.", "How"]


@pytest.fixture(autouse=True)
def _fresh():
    """Forget what other tests have compiled: torch gives up after so many graphs of a function."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Trace as torch.compile does, but run the graph's operations one by one, which is quick."""
    monkeypatch.setattr(torch, "compile", traced_only)


def sampled(engine, tokenizer, num_samples=4, prompts=(0, 1, 2), tokens=12):
    return engine.generate(
        [tokenizer.encode(PROMPTS[i]) for i in prompts],
        num_samples=num_samples,
        max_new_tokens=tokens,
        temperature=1.0,
        seeds=list(prompts),
    )


def assert_as_without(compiled, plain, tokenizer):
    expected = sampled(plain, tokenizer)
    found = sampled(compiled, tokenizer)
    assert [[s.ids for s in group] for group in found] == [[s.ids for s in g] for g in expected]
    pairs = zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(torch.tensor(ours.logp), torch.tensor(theirs.logp))


def test_samples_are_those_of_the_model_as_it_is(tiny, tokenizer):
    model = tiny("llama").eval()
    compiled = TransformersEngine(model, tokenizer, compiles=True)
    assert_as_without(compiled, TransformersEngine(model, tokenizer), tokenizer)
    # The weights of the next update.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_as_without(compiled, TransformersEngine(model, tokenizer), tokenizer)
    # Alone, rows have the same bits, also where a step has one row, and nothing is compiled anew.
    together = sampled(compiled, tokenizer)
    for i, group in enumerate(together):
        assert sampled(compiled, tokenizer, prompts=[i]) == [group]
        assert sampled(compiled, tokenizer, num_samples=1, prompts=[i]) == [group[:1]]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "architecture",
    [
        "gemma2",  # windows and softcaps
        "stablelm",  # its layers hand their attention the mask alone
        "llama4_text",  # queries that depend on the position
        "gpt2",  # positions that are added
    ],
)
@pytest.mark.usefixtures("traced")
def test_attention_has_the_form_of_each_layer(tokenizer, architecture):
    options = {"sliding_window": 8} if architecture == "gemma2" else {}
    model = other_model(architecture, tokenizer, **options).eval()
    compiled = TransformersEngine(model, tokenizer, compiles=True)
    assert_as_without(compiled, TransformersEngine(model, tokenizer), tokenizer)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced")
def test_an_adapter_and_a_copy_are_compiled_too(tiny, tokenizer):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("qwen2"), lora).eval()
    compiled = TransformersEngine(model, tokenizer, compiles=True)
    assert_as_without(compiled, TransformersEngine(model, tokenizer), tokenizer)
    # Between calls torch looks whether its graph is still of this model.
    with model.disable_adapter():
        assert_as_without(compiled, TransformersEngine(model, tokenizer), tokenizer)
    dtype = torch.bfloat16
    copied = CastEngine(model, tokenizer, dtype, compiles=True)
    assert_as_without(copied, CastEngine(model, tokenizer, dtype), tokenizer)


@pytest.mark.usefixtures("traced")
def test_guards_are_left_out_only_for_as_many_rows_of_the_same_call(tiny, tokenizer, monkeypatch):
    steps: list[tuple[int, int, bool]] = []
    is_unguarded = False

    @contextlib.contextmanager
    def unguarded():
        nonlocal is_unguarded
        is_unguarded = True
        yield
        is_unguarded = False

    attend = compiled.DecodingKeys.attend_known

    def attended(keys, layer, *states):
        if layer == 0:
            steps.append((id(keys), len(keys.own_lengths), is_unguarded))
        return attend(keys, layer, *states)

    monkeypatch.setattr(compiled, "_unguarded", unguarded)
    monkeypatch.setattr(compiled.DecodingKeys, "attend_known", attended)
    engine = TransformersEngine(tiny(), tokenizer, compiles=True)
    for _ in range(3):
        sampled(engine, tokenizer, tokens=40)
    calls = [list(group) for _, group in itertools.groupby(steps, key=lambda step: step[0])]
    assert len(calls) == 3
    for call in calls:
        counts = [count for _, count, _ in call]
        assert len(set(counts)) > 2
        expected = [False, *(a == b for a, b in itertools.pairwise(counts))]
        assert [unguarded for *_, unguarded in call] == expected


@pytest.mark.usefixtures("traced")
def test_under_autocast_keys_are_kept_in_its_dtype(tiny, tokenizer):
    model = tiny().eval()
    compiled = TransformersEngine(model, tokenizer, compiles=True)
    plain = TransformersEngine(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_without(compiled, plain, tokenizer)


def test_a_model_that_is_no_single_graph_is_refused(tokenizer):
    engine = TransformersEngine(other_model("qwen3_moe", tokenizer), tokenizer, compiles=True)
    with pytest.raises(ValueError, match=r"rollout_compile: .* one graph, got Qwen3MoeModel: "):
        sampled(engine, tokenizer)


@pytest.mark.usefixtures("traced")
def test_each_engine_has_a_graph_of_its_own(tiny, tokenizer):
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            sampled(TransformersEngine(tiny(), tokenizer, compiles=True), tokenizer, tokens=3)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_model_that_is_left_to_generate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"rollout_compile: .* own steps, got JambaForCausalLM: "):
        TransformersEngine(other_model("jamba", tokenizer), tokenizer, compiles=True)


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_graph_that_computes_something_else_is_found(tiny, tokenizer, monkeypatch, factor):
    def compiled(step, **options):
        return lambda **inputs: step(**inputs) * factor

    monkeypatch.setattr(torch, "compile", compiled)
    engine = TransformersEngine(tiny(), tokenizer, compiles=True)
    with pytest.raises(
        ValueError, match=r"rollout_compile: .* as it is, got LlamaModel: its hidden"
    ):
        sampled(engine, tokenizer)


def test_only_whole_models_in_this_process_are_compiled(tiny, tokenizer, tmp_path):
    args = EngineArguments(rollout_compile=True)
    with pytest.raises(ValueError, match=r"rollout_compile: expected it left out where .* shards"):
        make_engine(args, tiny(), tokenizer, tmp_path, sharded=True)
    args = EngineArguments(rollout_compile=True, rollout_engine="vllm")
    with pytest.raises(
        ValueError, match=r"rollout_compile: expected rollout_engine='transformers'"
    ):
        args.check_engine(temperature=1.0)
    engine = make_engine(EngineArguments(rollout_compile=True), tiny(), tokenizer, tmp_path)
    assert engine._trunk is not None

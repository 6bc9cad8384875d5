"""The installed forwards, and what copies, saves, wraps, compiles and inspects a model."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import sys
from types import FrameType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from transformers import AutoModelForCausalLM

from latro.model.head_rows import HeadRows, install_head_rows
from latro.model.initial import AdapterOff
from latro.model.scoring import Scorer
from latro_kernels.integrations.transformers import fused_head
from tests.latro.other_models import other_model


@pytest.fixture
def scored(tiny, rollouts):
    """`scored(model)`: the log-probs that a new `Scorer` gives for fixed rollouts."""

    def score(model, **settings):
        scorer = Scorer(model, **settings)
        return scorer(scorer.collate(rollouts(2, 4))).logp.detach()

    return score


def logits(model):
    return model(input_ids=torch.arange(1, 9)[None]).logits.detach()


def test_without_the_keyword_forwards_and_generate_are_the_old_ones(tiny):
    plain, model = tiny(seed=1), tiny(seed=1)
    install_head_rows(model)
    ids, settings = torch.arange(1, 9)[None], {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    ours, theirs = model(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
    assert torch.equal(ours.loss, theirs.loss)
    hidden = torch.randn(3, 32)
    assert torch.equal(model.lm_head(hidden), plain.lm_head(hidden))


def test_scorers_share_one_model(tiny, rollouts):
    model = tiny()
    cool, warm = (Scorer(model, temperature=t) for t in (0.5, 2.0))
    forwards = model.forward, model.lm_head.forward
    batch = cool.collate(rollouts(2, 4))
    first = cool(batch).logp
    assert not torch.equal(first, warm(batch).logp)
    assert torch.equal(first, cool(batch).logp)
    assert (cool(batch, cool.reference(batch)).row_kl == 0).all()
    # A third installs nothing over what is there.
    Scorer(model)
    assert forwards == (model.forward, model.lm_head.forward)


def test_a_copy_is_on_its_own(tiny, scored):
    model = tiny()
    before = scored(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].mlp.up_proj.weight.mul_(3)
        copied.lm_head.weight.mul_(2)
    assert torch.equal(scored(model), before)
    assert not torch.allclose(scored(copied), before)
    assert not torch.allclose(logits(copied), logits(model))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert logits(copied).abs().max() > 0


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_pickled_model_is_scored_again(tokenizer, scored, architecture):
    model = other_model(architecture, tokenizer)
    before = scored(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(scored(loaded), before)


def test_what_is_saved_is_the_model_alone(tiny, scored, tmp_path):
    plain, model = tiny(seed=1), tiny(seed=1)
    before = scored(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("ours", "plain")
    )
    assert ours == theirs
    assert torch.equal(scored(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), before)


def test_a_forward_that_somebody_replaced_is_kept(tiny, scored):
    model = tiny()
    own, calls = model.forward, []

    def forward(**kwargs):
        calls.append(kwargs)
        return own(**kwargs)

    model.forward = forward
    scored(model)
    calls.clear()
    logits(model)
    assert len(calls) == 1


def test_another_forward_may_stand_between_two_installations(tiny, scored):
    """One that hides the keyword in its signature, and hands it on, as TRL's fused head does."""
    model = tiny()
    expected = logits(model), scored(model)
    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args, **kwargs):
        return own(*args, **kwargs)

    model.forward = forward
    assert torch.equal(scored(model), expected[1])
    assert torch.equal(logits(model), expected[0])


def test_a_model_with_a_fused_head_is_scored(tiny, scored):
    model = tiny()
    expected = logits(model), scored(tiny())
    fused_head(model)
    assert torch.equal(scored(model), expected[1])
    assert torch.equal(logits(model), expected[0])


def test_a_model_that_is_scored_may_have_its_head_fused(tiny, rollouts):
    model = tiny()
    scorer = Scorer(model)
    batch = scorer.collate(rollouts(2, 4))
    expected = scorer(batch).logp
    fused_head(model)
    assert torch.equal(scorer(batch).logp, expected)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(model(ids, labels=ids).loss, tiny()(ids, labels=ids).loss)


def test_the_signature_is_the_models_and_the_keyword(tiny):
    model = tiny()
    own = {m: inspect.signature(m.forward).parameters for m in (model, model.lm_head)}
    install_head_rows(model)
    for module, parameters in own.items():
        expected = [*parameters.values()]
        found = inspect.signature(module.forward).parameters
        assert [p for p in found.values() if p.name != "head_rows"] == expected
        assert found["head_rows"].kind == inspect.Parameter.KEYWORD_ONLY
    # Both read the signature: generate to refuse what a model does not take, and to ask for the
    # logits of the last position alone.
    assert model._supports_logits_to_keep()
    with pytest.raises(ValueError, match=r"not used by the model.*pixel_values"):
        model.generate(torch.tensor([[1]]), max_new_tokens=1, pixel_values=torch.zeros(1))


def test_a_compiled_model_generates(tiny):
    plain, model = tiny(seed=1), tiny(seed=1)
    install_head_rows(model)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    plain.forward = torch.compile(plain.forward, backend="eager", fullgraph=True)
    ids = torch.arange(1, 9)[None]
    settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(logits(model), logits(plain))
    settings["disable_compile"] = True
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.fixture
def bf16():
    """Return an accelerator that wraps a model's forward in autocast."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_autocast_around_the_forward(tiny, rollouts, bf16):
    model = tiny()
    scorer = Scorer(model)
    batch = scorer.collate(rollouts(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = scorer(batch).logp
    exact = scorer(batch).logp
    assert not torch.equal(expected, exact)
    bf16.prepare_model(model)
    wrapped = model.forward
    assert torch.equal(scorer(batch).logp, expected)
    Scorer(model)
    assert model.forward == wrapped
    assert logits(model).dtype == torch.float32
    assert bf16.unwrap_model(model) is model
    # Without the wrapper of mixed precision the forward is made anew, from what it wraps.
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert model.forward != wrapped
    assert torch.equal(scorer(batch).logp, exact)
    logits(model)


def test_a_references_weight_stays_in_half_precision(tiny, rollouts, bf16):
    """Accelerate makes fp32 of the tensors that a forward returns; the head is too large for it."""
    model = tiny().to(torch.bfloat16)
    scorer = Scorer(model)
    bf16.prepare_model(model)
    reference = scorer.reference(scorer.collate(rollouts(1, 2)))
    assert reference.hidden.dtype == reference.weight.dtype == torch.bfloat16
    assert reference.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_of_peft(tiny, scored, rollouts, options, when):
    """An adapter that is put on a model `before` it is scored for the first time, or `after`."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    base = tiny()
    before = scored(copy.deepcopy(base))
    if when == "after":
        scored(base)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    scorer = Scorer(model)
    batch = scorer.collate(rollouts(2, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert not torch.equal(scorer(batch).logp, before)
    assert torch.equal(AdapterOff(scorer)(batch).logp, before)
    scorer(batch).logp.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model))
    torch.testing.assert_close(scored(merged), scorer(batch).logp.detach())


def test_rows_of_a_head_that_an_adapter_trains_are_refused(tiny):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}
    )
    model = peft.get_peft_model(tiny(), config)
    expected = logits(model)
    with pytest.raises(ValueError, match="without adapter, or with LoRA's"):
        Scorer(model)
    assert torch.equal(logits(model), expected)


def test_engines_see_calls_of_model_and_head(tiny, rollouts):
    model = tiny()
    scorer = Scorer(model)
    seen = []
    for module in (model, model.model, model.lm_head):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, kwargs.get("head_rows"))),
            with_kwargs=True,
        )
    scorer(scorer.collate(rollouts(1, 2)))
    assert [module for module, _ in seen] == [model, model.model, model.lm_head]
    assert [isinstance(rows, HeadRows) for _, rows in seen] == [True, False, True]


def frames_until(function, within):
    """Names of our frames from the function named `within` to `function`, where it is called."""
    frame: FrameType | None = sys._getframe(2)
    names = [function.__name__]
    while frame is not None and names[-1] != within:
        if frame.f_globals["__name__"].startswith(("latro.", "latro_kernels.")):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    assert names[-1] == within, names
    return names


@pytest.mark.parametrize(
    ("where", "limit"),
    [("latro.model.head_rows.linear_logprob", 5), ("latro_kernels.native.call", 9)],
)
def test_few_frames_lie_between_an_update_and_its_kernel(make_trainer, monkeypatch, where, limit):
    module, _, name = where.rpartition(".")
    function = getattr(sys.modules[module], name)
    found = []

    def called(*args, **kwargs):
        if name != "call" or "linear_logprob" in args[0]:
            found.append(frames_until(function, "_in_one_piece"))
        return function(*args, **kwargs)

    trainer = make_trainer(max_steps=1, beta=0.0)
    monkeypatch.setattr(where, called)
    trainer.train()
    assert found
    assert max(map(len, found)) <= limit, max(found, key=len)

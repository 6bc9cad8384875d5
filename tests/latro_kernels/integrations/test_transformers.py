"""`fused_head`: a model's loss and log-probs as from its logits, and everything else as before."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from latro_kernels.integrations.transformers import fused_head, unfused_head
from tests.latro_kernels.integrations.models import MODELS, SMALL_MODEL, TOKENIZER, batch, model_of

pytest.importorskip("datasets", reason="needs datasets, of pip install '.[test]'")

from transformers import Trainer, TrainingArguments


def assert_as_exact(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold to the gate: at most twice the error of the plain way, plus 1e-5, relative to 1."""
    scale = max(1.0, truth.abs().max().item())

    def error(x: Tensor) -> float:
        return ((x.double() - truth).abs().max() / scale).item()

    assert error(ours) <= 2 * error(plain) + 1e-5


def gradients(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def compare(
    model: PreTrainedModel, of_fused: Callable[[Any], Tensor], of_plain: Callable[[Any], Tensor]
) -> None:
    """Hold a scalar of a model with a fused head, and all gradients, to those of its logits."""
    results = []
    ids, labels = batch()
    fused = fused_head(copy.deepcopy(model))
    assert fused(ids, labels=labels).logits is None
    for each, function in (
        (fused, of_fused),
        (copy.deepcopy(model), of_plain),
        (copy.deepcopy(model).double(), of_plain),
    ):
        value = function(each)
        value.backward()
        results.append((value.detach(), gradients(each)))
    (ours, d_ours), (plain, d_plain), (truth, d_truth) = results
    assert d_truth.abs().max() > 1e-3
    assert_as_exact(ours, plain, truth)
    assert_as_exact(d_ours, d_plain, d_truth)


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("architecture", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(architecture: str, items: int | None) -> None:
    ids, labels = batch()
    options: dict[str, Any] = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    if architecture == "qwen3_moe":
        options["output_router_logits"] = True

    def loss(model: Any) -> Tensor:
        return model(ids, labels=labels, **options).loss

    compare(model_of(architecture), loss, loss)


@pytest.mark.parametrize("architecture", MODELS)
def test_logprobs_and_entropies_are_those_of_the_logits(architecture: str) -> None:
    ids, labels = batch()
    upstream = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))

    def ours(model: Any) -> Tensor:
        both = model.logprobs(ids, labels=labels, temperature=0.7, return_entropy=True)
        return (torch.stack(both) * upstream).sum()

    def plain(model: Any) -> Tensor:
        log_p = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1)
        logp = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
        both = torch.stack([logp, -(log_p.exp() * log_p).sum(-1)])
        return (both * upstream * (labels[:, 1:] != -100)).sum()

    compare(model_of(architecture), ours, plain)


def test_tied_and_frozen_heads_and_a_head_with_bias() -> None:
    ids, labels = batch()

    def loss(model: Any) -> Tensor:
        return model(ids, labels=labels).loss

    tied = AutoModelForCausalLM.from_pretrained(SMALL_MODEL).eval()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    compare(tied, loss, loss)
    frozen = model_of("gemma2")
    frozen.get_output_embeddings().weight.requires_grad_(False)
    compare(frozen, loss, loss)
    biased = model_of("llama")
    biased.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, len(TOKENIZER)))
    compare(biased, loss, loss)


def test_logprobs_leave_padding_out() -> None:
    model = fused_head(model_of("llama"))
    ids, _ = batch()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    logp = model.logprobs(ids, attention_mask=mask)
    assert (logp[0, 7:] == 0).all()
    assert (logp[1] < 0).all()
    given = model.logprobs(ids, attention_mask=mask, use_cache=False)  # as many callers have it
    assert torch.equal(given, logp)


@pytest.mark.parametrize("left", [0, 1, 4])
def test_padding_at_the_left_adds_no_token(left: int) -> None:
    """A row's first token has none before it, so a row has the same sum wherever it is padded."""
    model = model_of("llama")
    ids, _ = batch()
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    own = ids[:1, left:]
    log_p = copy.deepcopy(model).double()(own).logits[:, :-1].log_softmax(-1)
    truth = log_p.gather(2, own[:, 1:, None]).squeeze()
    logp = fused_head(model).logprobs(ids, attention_mask=mask)[0].double()
    assert (logp[:left] == 0).all()
    torch.testing.assert_close(logp[left:], truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [1, 2]}}]
)
def test_an_adapter_that_lies_on_the_head_already_is_refused(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **options}
    )
    adapted = peft.get_peft_model(model_of("llama"), config).get_base_model()
    with pytest.raises(ValueError, match=r"^model: expected a head without an adapter"):
        fused_head(adapted)


def test_a_head_that_an_adapter_trains_whole_is_the_one_that_scores() -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model_of("llama"), config).get_base_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)

    def loss(each: Any) -> Tensor:
        ids, labels = batch()
        return each(ids, labels=labels).loss

    compare(model, loss, loss)


def test_other_labels_and_keywords_are_transformers_own() -> None:
    model = model_of("llama")
    fused = fused_head(copy.deepcopy(model))
    ids, labels = batch()
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    for options in ({"shift_labels": shifted}, {"ignore_index": 5}, {"attention_mask": ids > 9}):
        given = ids if "ignore_index" in options else labels
        torch.testing.assert_close(
            fused(ids, labels=given, **options).loss, model(ids, labels=given, **options).loss
        )
    by_place = fused(ids, None, None, None, None, labels)
    torch.testing.assert_close(by_place.loss, model(ids, labels=labels).loss)
    assert by_place.logits is None
    hidden = fused(ids, labels=labels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden, model(ids, output_hidden_states=True).hidden_states)
    nothing = fused(ids, labels=torch.full_like(ids, -100)).loss
    assert torch.isnan(nothing)
    assert torch.isnan(model(ids, labels=torch.full_like(ids, -100)).loss)


def test_without_labels_a_model_is_as_before() -> None:
    model = model_of("gemma2")
    ids, _ = batch()
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    signature = inspect.signature(model.forward)
    before = set(vars(model)), set(vars(model.lm_head)), model.loss_function
    model.model.layers[0].train()
    assert fused_head(fused_head(model)) is model
    assert not model.training
    assert model.model.layers[0].training
    model.eval()
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    unfused_head(unfused_head(model))
    assert (set(vars(model)), set(vars(model.lm_head)), model.loss_function) == before
    assert model(ids, labels=ids).logits is not None


def test_a_pickle_would_not_have_the_head_and_is_refused() -> None:
    model, (ids, _) = fused_head(model_of("llama")), batch()
    with pytest.raises(PicklingError, match=r"unfused_head\(model\) first"):
        torch.save(model, io.BytesIO())
    file = io.BytesIO()
    torch.save(unfused_head(model), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_copy_has_a_head_of_its_own() -> None:
    model = fused_head(model_of("cohere"))
    other = copy.deepcopy(model)
    ids, labels = batch()
    other.model.embed_tokens.weight.data.mul_(2)
    unfused_head(model)
    output = other(ids, labels=labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, unfused_head(other)(ids, labels=labels).loss)


def no_logits(output: Any) -> None:
    assert output.logits is None


def weights_after(model: PreTrainedModel, dtype: torch.dtype, folder: Path, fused: bool) -> Tensor:
    """Return all weights after one step of SGD over three micro-batches."""
    model = copy.deepcopy(model).to(dtype)
    lengths = (12, 5, 9, 3, 7, 12)
    rows = [
        {"input_ids": ids[:n], "labels": labels[:n]}
        for n, ids, labels in zip(lengths, *(x.repeat(2, 1) for x in batch()), strict=True)
    ]
    args = TrainingArguments(
        str(folder), max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, gradient_accumulation_steps=6, per_device_train_batch_size=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    if fused:
        fused_head(model).register_forward_hook(lambda _, __, output: no_logits(output))
    Trainer(model, args, train_dataset=rows).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_trainer_steps_as_without_it(tmp_path: Path) -> None:
    """Micro-batches have different numbers of labels, and Trainer counts them all."""
    model = model_of("gemma2")
    ours = weights_after(model, torch.float32, tmp_path, fused=True)
    plain = weights_after(model, torch.float32, tmp_path, fused=False)
    truth = weights_after(model, torch.float64, tmp_path, fused=False)
    assert_as_exact(ours, plain, truth)
    assert (truth - weights_of(model)).abs().max() > 1e-3


def weights_of(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_adapter_on_the_trunk_is_trained_and_one_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft, of pip install '.[peft]'")
    ids, labels = batch()
    plain = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    ours = peft.get_peft_model(
        fused_head(model_of("llama")), peft.LoraConfig(target_modules=["q_proj"])
    )
    ours.load_state_dict(plain.state_dict())
    for model in (ours, plain):
        model(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(gradients(ours), gradients(plain))
    on_head = peft.get_peft_model(
        fused_head(model_of("llama")), peft.LoraConfig(target_modules=["lm_head"])
    )
    with pytest.raises(ValueError, match="leave it out of an adapter's modules"):
        on_head(input_ids=ids, labels=labels)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        fused_head(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = model_of("llama")
    with pytest.raises(ValueError, match="with a head, got LlamaModel"):
        fused_head(model.model)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="loss of causal language models"):
        fused_head(model)


def test_a_model_whose_forward_has_another_seam_is_refused_in_clear_words() -> None:
    model = model_of("llama")
    own = model.forward
    model.forward = lambda labels=None, **inputs: own(**inputs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="LlamaForCausalLM does not make its loss by"):
        fused_head(model)
    assert "_loss_function" not in vars(model)
    model = fused_head(model_of("llama"))
    ids, labels = batch()
    model._own_forward = lambda **_: None
    with pytest.raises(RuntimeError, match="LlamaForCausalLM did not call its head"):
        model(input_ids=ids, labels=labels)

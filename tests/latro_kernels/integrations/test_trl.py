"""`patch_trl`: TRL's trainers score and train as without it, by `linear_logprob`."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from latro_kernels import RowStatistics, linear_logprob
from tests.latro_kernels.integrations.models import MODELS, SMALL_MODEL, TOKENIZER, batch, model_of

trl = pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl.kernels import chunked_logprob  # noqa: E402
from trl.trainer import utils as seam  # noqa: E402

from latro_kernels.integrations.trl import LinearLogprob, patch_trl, unpatch_trl  # noqa: E402

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


def fused(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [2, B, T − 1], and the loss, of TRL's fused head."""
    ids, labels = batch()
    seam.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "is_top1"))
    output = model(ids, labels=labels, fused_lm_head=True, **options)
    return torch.stack([output.log_probs, output.entropy]), output.loss


def unfused(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the same from the logits that a model in fp64 makes."""
    ids, labels = batch()
    output = model(ids, **options)
    log_p = (output.logits[:, :-1] / 0.7).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    mask = labels[:, 1:] != -100
    logp = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    loss = -logp[mask].sum() / mask.sum()
    if options:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    return torch.stack([logp, entropy]) * mask, loss


def measured(
    score: Callable[..., tuple[Tensor, Tensor]], model: PreTrainedModel, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the scores, the loss, and all gradients of both together."""
    both, loss = score(model, **options)
    upstream = torch.randn(both.shape, generator=torch.Generator().manual_seed(1))
    (loss + (both * upstream).sum()).backward()
    found = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | {"scores": both.detach(), "loss": loss.detach()}


@pytest.mark.parametrize("architecture", MODELS)
def test_scores_losses_and_gradients_are_as_exact_as_trls(architecture: str) -> None:
    model = model_of(architecture)
    options = {"output_router_logits": True} if architecture == "qwen3_moe" else {}
    theirs = measured(fused, copy.deepcopy(model), options)
    truth = measured(unfused, copy.deepcopy(model).double(), options)
    with patch_trl():
        ours = measured(fused, model, options)
    assert truth["scores"][0].min() < -5
    for name, exact in truth.items():
        scale = max(1.0, exact.abs().max().item())

        def error(x: Tensor, exact: Tensor = exact, scale: float = scale) -> float:
            return ((x.double() - exact).abs().max() / scale).item()

        assert error(ours[name]) <= 2 * error(theirs[name]) + 1e-5, name


def exactly(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Return log-probs and entropies [2, N] in fp64, of the head's input and weight as they are."""
    target, temperature, _, softcap, scale, _ = rest
    z = hidden.double() @ weight.double().T * scale
    assert bias is None
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_p = (z / temperature).log_softmax(-1)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    return torch.stack([logp, -(log_p.exp() * log_p).sum(-1)])


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("architecture", MODELS)
def test_in_bf16_scores_are_nearer_to_fp64_than_trls(
    architecture: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk's rounding is both's alike: the truth is of the states that the trunk has made."""
    errors: dict[str, Tensor] = {}

    def compared(*arguments: Any) -> Any:
        ways = {"ours": LinearLogprob, "theirs": chunked_logprob.ChunkedLogProbFunction}
        found = {name: way.apply(*arguments) for name, way in ways.items()}
        hidden, weight, *rest = arguments
        truth = exactly(hidden.bfloat16(), weight.bfloat16(), *rest)
        for name, (logp, entropy, *_) in found.items():
            errors[name] = (torch.stack([logp, entropy]).double() - truth).abs()
        return found["ours"]

    monkeypatch.setattr(seam, "_ChunkedLogProbFunction", SimpleNamespace(apply=compared))
    model = model_of(architecture)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused(model if autocast else model.bfloat16())
    assert errors["ours"].shape[1] > 10
    # Log-probs, then entropies: the worst token, and all of them.
    assert (errors["ours"].amax(1) < errors["theirs"].amax(1)).all()
    assert (errors["ours"].mean(1) < errors["theirs"].mean(1)).all()


def test_log_sum_of_squares_is_exact_for_peaked_and_flat_rows_and_has_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 16, generator=generator) * torch.logspace(-3, 1, 60)[:, None]
    weight = torch.randn(230, 16, generator=generator)
    target = torch.randint(230, (60,), generator=generator)
    given = (target, 0.7, 8, None, 1.0, ("log_sum_sq_probs",))
    log_p = (hidden.double() @ weight.double().T / 0.7).log_softmax(-1)
    assert log_p.amax(1).exp().max() > 0.999
    truth = (2 * log_p).logsumexp(-1)

    def error(way: Any) -> float:
        found = way.apply(hidden.requires_grad_(), weight, None, *given)[2]
        assert not found.requires_grad
        return (found - truth).abs().max().item()

    assert error(LinearLogprob) <= 2 * error(chunked_logprob.ChunkedLogProbFunction) + 1e-5


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_each_output_is_trls_and_only_what_was_asked_for(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator)
    weight, bias = torch.randn(23, 16, generator=generator), torch.randn(23, generator=generator)
    target = torch.randint(23, (40,), generator=generator)
    given = (hidden, weight, bias, target, 0.7, 8)
    alone = (("entropy",), ("is_top1",), ("mean_logits",), ("log_sum_sq_probs",), ())
    for arguments in (given, *((*given, softcap, 0.5, outputs) for outputs in alone)):
        ours = LinearLogprob.apply(*arguments)
        theirs = chunked_logprob.ChunkedLogProbFunction.apply(*arguments)
        for x, y in zip(ours, theirs, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.0), (None, -0.5), (0.0, 1.0)])
def test_a_scale_or_softcap_that_is_not_above_0_is_left_to_trl(
    softcap: float | None, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (40, 23))
    target = torch.randint(23, (40,), generator=generator)
    given = (hidden, weight, None, target, 0.7, 8, softcap, scale)
    theirs = chunked_logprob.ChunkedLogProbFunction.apply(*given)
    for x, y in zip(LinearLogprob.apply(*given), theirs, strict=True):
        assert torch.equal(x, y)


def test_all_outputs_of_capped_logits_are_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (40, 23))
    target = torch.randint(23, (40,), generator=generator)
    given = (hidden, weight, None, target, 0.7, 8, 30.0, 0.5)
    theirs = chunked_logprob.ChunkedLogProbFunction.apply(*given)
    passes = []

    def counted(*arguments: Any, **settings: Any) -> RowStatistics:
        passes.append(settings)
        return linear_logprob(*arguments, **settings)

    monkeypatch.setattr("latro_kernels.integrations.trl.linear_logprob", counted)
    monkeypatch.delattr(chunked_logprob, "ChunkedLogProbFunction")
    for x, y in zip(LinearLogprob.apply(*given), theirs, strict=True):
        torch.testing.assert_close(x, y)
    assert len(passes) == 1


def test_all_labels_ignored_is_a_loss_of_zero_with_a_gradient() -> None:
    model = model_of("llama")
    seam.add_fused_lm_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with patch_trl():
        loss = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


ONLINE = [{"prompt": f"Tom has {n} pens. How many?"} for n in range(2, 10)]
TEXTS = [{"prompt": f"Tom has {n} pens.", "completion": f" He has {n}."} for n in range(2, 10)]
PAIRS = [{"prompt": "Tom", "chosen": f" has {n}.", "rejected": " no."} for n in range(2, 10)]
LABELLED = [dict(row, label=bool(n % 2)) for n, row in enumerate(TEXTS)]
TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "RLOO": (ONLINE, {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}),
    "GRPO": (ONLINE, {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}),
    "SFT": (TEXTS, {}),
    "SFT with LoRA": (TEXTS, {}),
    "DPO": (PAIRS, {}),
    "KTO": (LABELLED, {}),
}


def two_updates(kind: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return all weights that are trained, before and after."""
    rows, options = TRAINERS[kind]
    name = kind.split(maxsplit=1)[0]
    args = getattr(trl, f"{name}Config")(
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4},
        **{"learning_rate": 0.01, "optim": "sgd", "lr_scheduler_type": "constant", "bf16": False},
        **{"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True},
        **{"gradient_checkpointing": False, **options},
    )
    others: dict[str, Any] = {}
    if "num_generations" in options:
        others["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
    if kind == "SFT with LoRA":
        others["peft_config"] = LoraConfig(target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    trainer = getattr(trl, f"{name}Trainer")(
        AutoModelForCausalLM.from_pretrained(SMALL_MODEL),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(TOKENIZER),
        **others,
    )

    def weights() -> Tensor:
        trained = (p for p in trainer.model.parameters() if p.requires_grad)
        return torch.cat([p.detach().flatten() for p in trained]).double()

    before = weights()
    trainer.train()
    return before, weights()


@pytest.mark.parametrize("kind", TRAINERS)
def test_two_updates_are_trls(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights differ by no more than TRL's own do where its tiles have another width."""
    own_apply = LinearLogprob.apply
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return own_apply(*arguments)

    before, theirs = two_updates(kind, tmp_path)
    with monkeypatch.context() as narrow:
        narrow.setattr(seam, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
        noise = (two_updates(kind, tmp_path)[1] - theirs).abs().max()
    monkeypatch.setattr(LinearLogprob, "apply", counted)
    with patch_trl():
        ours = two_updates(kind, tmp_path)[1]
    assert calls
    moved = (theirs - before).abs().max()
    assert moved > 1e-6
    assert (ours - theirs).abs().max() <= 2 * noise + 1e-5 * moved


# The seam.


def test_nothing_is_imported_or_patched_before_it_is_asked_for() -> None:
    code = (
        "import sys, latro_kernels\n"
        "assert not {'trl', 'transformers', 'verl'} & set(sys.modules)\n"
        "import latro_kernels.integrations.trl\n"
        "from trl.trainer import utils\n"
        "from trl.kernels import ChunkedLogProbFunction\n"
        "assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_patch_ends_where_it_should() -> None:
    before = (seam._ChunkedLogProbFunction, seam._use_triton)
    with patch_trl():
        assert seam._ChunkedLogProbFunction is LinearLogprob
    assert (seam._ChunkedLogProbFunction, seam._use_triton) == before
    patch_trl()
    patch_trl()
    assert seam._ChunkedLogProbFunction is LinearLogprob
    unpatch_trl()
    assert (seam._ChunkedLogProbFunction, seam._use_triton) == before


def moved_forward(ctx: Any, hidden: Tensor, weight: Tensor) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("where", "name", "value", "word"),
    [
        (seam, "_ChunkedLogProbFunction", None, "no _ChunkedLogProbFunction"),
        (seam, "add_fused_lm_head", moved_forward, "no _ChunkedLogProbFunction"),
        (chunked_logprob, "ChunkedLogProbFunction", None, "no trl.kernels"),
        (chunked_logprob.ChunkedLogProbFunction, "forward", moved_forward, "arguments"),
        (chunked_logprob, "OPTIONAL_OUTPUTS", ("entropy",), "outputs"),
    ],
    ids=["replaced", "unused", "gone", "arguments", "outputs"],
)
def test_a_trl_whose_seam_moved_is_refused_by_name_and_version(
    where: Any, name: str, value: Any, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delattr(where, name)
    else:
        monkeypatch.setattr(where, name, value)
    with pytest.raises(RuntimeError, match=rf"TRL {trl.__version__} .*{word}"):
        patch_trl()

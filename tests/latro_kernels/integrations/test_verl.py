"""verl's two fused heads: results as from the logits, shapes and gradients as verl's."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from latro_kernels.integrations import verl

V, H = 401, 96


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) / 4).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (2, 9), generator=generator)


def unfused(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels[..., None]).squeeze(-1), entropy


def gradients(scores: tuple[Tensor, Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return scores and gradients, of which those of rows are flat."""
    generator = torch.Generator().manual_seed(1)
    flat = [s.flatten() for s in scores]
    loss = torch.zeros((), dtype=flat[0].dtype)
    for score in flat:
        loss = loss + (score * torch.randn(18, generator=generator)[: len(score)]).sum()
    return [*(s.detach() for s in flat), *torch.autograd.grad(loss, inputs)]


def gate(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    for x, y, exact in zip(ours, plain, truth, strict=True):
        assert x.shape == exact.shape
        assert (x - exact).abs().max() <= 2 * (y - exact).abs().max() + 1e-5


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", None])
def test_linear_cross_entropy(reduction: str | None) -> None:
    def plain(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, labels = problem(dtype)
        logp, entropy = unfused(hidden, weight, labels, 0.7)
        if reduction in ("sum", "mean"):
            logp = getattr(logp, reduction)()
        return gradients((logp, entropy), hidden, weight)

    hidden, weight, labels = problem()
    scores = verl.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    assert scores[0].shape == ((18,) if reduction in ("none", None) else ())
    assert scores[1].shape == (18,)
    gate(gradients(scores, hidden, weight), plain(torch.float32), plain(torch.float64))


def test_another_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of none, sum, mean, got 'max'"):
        verl.linear_cross_entropy(*problem(), reduction="max")


@pytest.mark.parametrize("kind", ["number", "scalar", "one", "each"])
@pytest.mark.parametrize("flat", [False, True])
def test_fused_linear_for_ppo(kind: str, flat: bool) -> None:
    each = torch.linspace(0.5, 1.5, 18).view(2, 9)
    given = {"number": 0.7, "scalar": torch.tensor(0.7), "one": torch.tensor([0.7]), "each": each}
    temperature = given[kind]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, labels = problem(dtype)
        t = each[..., None].to(dtype) if kind == "each" else float(temperature)
        return gradients(unfused(hidden, weight, labels, t), hidden, weight)

    hidden, weight, labels = problem()
    x, y, t = hidden, labels, temperature
    if flat:
        x, y = hidden.flatten(0, 1), labels.flatten()
        t = each.flatten() if kind == "each" else temperature
    scores = verl.FusedLinearForPPO()(x, weight, y.to(torch.int32), t)
    assert scores[0].shape == scores[1].shape == y.shape
    gate(gradients(scores, hidden, weight), plain(torch.float32), plain(torch.float64))


def test_temperatures_of_no_tokens() -> None:
    _, weight, labels = problem()
    none = labels[:0]
    scores = verl.FusedLinearForPPO()(
        torch.empty(0, 9, len(weight.t())), weight, none, none.float()
    )
    assert scores[0].shape == scores[1].shape == none.shape


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    hidden, weight, labels = problem()
    own = weight.detach()[slice(0, 150) if rank == 0 else slice(150, None)].requires_grad_()
    scores = verl.linear_cross_entropy(hidden, own, labels, 0.7, "none", dist.group.WORLD)
    torch.save(gradients(scores, hidden, own), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_group_splits_the_vocabulary_and_its_sum_is_the_gradient_of_hidden(
    tmp_path: Path,
) -> None:
    """As in verl, whose callers sum the gradient of hidden over the group."""
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    (*scores, dx, dw), (*_, other_dx, other_dw) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )

    def plain(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, labels = problem(dtype)
        return gradients(unfused(hidden, weight, labels, 0.7), hidden, weight)

    ours = [*scores, dx + other_dx, torch.cat([dw, other_dw])]
    gate(ours, plain(torch.float32), plain(torch.float64))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
        ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
    ],
)
def test_arguments_are_verls(module: str, name: str) -> None:
    """Where verl is installed: the same arguments in the same order."""
    pytest.importorskip("verl", reason="needs verl")
    theirs, ours = getattr(import_module(module), name), getattr(verl, name)
    if inspect.isclass(theirs):
        theirs, ours = theirs.forward, ours.forward
    expected = {n: p.default for n, p in inspect.signature(theirs).parameters.items()}
    got = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    assert list(got.items()) == list(expected.items()), f"verl: the arguments of {name} moved"

"""linear_topk, which finds the likeliest tokens of a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from latro_kernels import linear_topk, linear_topk_kl, linear_topk_logprob, logit_tiles
from tests.latro_kernels.ops.linear_topk import problem, unfused
from tests.latro_kernels.test_memory import LargestTensor

HEAD = ("hidden", "weight", "bias", "temperature", "softcap")
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and slices of the vocabulary, the last of which is narrow."""
    monkeypatch.setattr(logit_tiles, "CPU_ROWS", 24)
    monkeypatch.setattr(logit_tiles, "CPU_COLUMNS", 48)


def head(shape: tuple[int, int, int], **options: Any) -> dict[str, Any]:
    given = problem(shape, **options)
    return {name: given[name] for name in HEAD}


def log_probs(dtype: torch.dtype, of: dict[str, Any]) -> Tensor:
    """Return all log-probs, without the kernels, in fp64 or as a model in `dtype` makes them."""
    V = len(of["weight"])
    tensors = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in of.items()}
    every = torch.arange(V).expand(*of["hidden"].shape[:-1], V)
    if dtype == torch.float64:
        z = tensors["hidden"] @ tensors["weight"].T + (0 if of["bias"] is None else tensors["bias"])
        z = z if of["softcap"] is None else of["softcap"] * torch.tanh(z / of["softcap"])
        return torch.log_softmax(z / of["temperature"], -1)
    return unfused(token=every, **tensors)[..., :V]


@each_backend
@pytest.mark.parametrize("k", [1, 5, 60, 101])
@pytest.mark.parametrize("shape", [(0, 5, 101), (1, 1, 101), (61, 17, 257), (30, 64, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "temperature": 0.7, "softcap": 5.0}, {"rows": "peaked"}]
)
def test_finds_the_likeliest(
    shape: Any, k: int, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    of = head(shape, dtype=dtype, **options)
    found = linear_topk(of["hidden"], of["weight"], k, **_settings(of), backend=backend)
    assert found.token.shape == found.log_prob.shape == (shape[0], k)
    assert found.log_prob.dtype == torch.float32
    true, plain = log_probs(torch.float64, of), log_probs(dtype, of).double()
    allowed = 2 * (plain - true).abs().amax() + 1e-5 if shape[0] else 0.0
    # Its numbers are those of its tokens, which are all different, and as likely as the likeliest.
    assert ((found.log_prob - true.gather(1, found.token)).abs() <= allowed).all()
    assert ((found.log_prob - true.topk(k).values).abs() <= allowed).all()
    assert all(len(set(row)) == k for row in found.token.tolist())
    assert (found.log_prob.diff(dim=1) <= 0).all()


@each_backend
def test_tokens_without_probability_are_none(backend: str) -> None:
    of = head((3, 8, 101), bias=True)
    of["bias"][10:] = -torch.inf
    of["hidden"][2] = torch.nan
    found = linear_topk(of["hidden"][:2], of["weight"], 12, bias=of["bias"], backend=backend)
    assert (found.token[:, :10].sort().values == torch.arange(10)).all()
    assert (found.token[:, 10:] == -1).all()
    assert (found.log_prob[:, 10:] == -torch.inf).all()
    torch.testing.assert_close(found.log_prob.exp().sum(1), torch.ones(2))
    nothing = torch.full((101,), -torch.inf)
    found = linear_topk(of["hidden"][:2], of["weight"], 2, bias=nothing, backend=backend)
    assert (found.token == -1).all()
    assert (found.log_prob == -torch.inf).all()


@each_backend
def test_leading_dimensions_and_strides(backend: str) -> None:
    of = head((24, 16, 257))
    flat = linear_topk(of["hidden"], of["weight"], 4, backend=backend)
    apart = of["hidden"].repeat_interleave(2, 1)[:, ::2].view(2, 3, 4, 16)
    transposed = of["weight"].t().contiguous().t()
    found = linear_topk(apart, transposed, 4, backend=backend)
    assert found.token.shape == (2, 3, 4, 4)
    assert torch.equal(found.token.flatten(0, 2), flat.token)
    torch.testing.assert_close(found.log_prob.flatten(0, 2), flat.log_prob)


def test_a_student_that_is_its_teacher_has_no_kl() -> None:
    of = head((20, 16, 257))
    found = linear_topk(of["hidden"], of["weight"], 8)
    kl = linear_topk_kl(of["hidden"], of["weight"], found.token, found.log_prob)
    assert kl.abs().max() < 1e-6
    of_tokens = linear_topk_logprob(of["hidden"], of["weight"], found.token)[:, :-1]
    torch.testing.assert_close(of_tokens, found.log_prob, rtol=1e-5, atol=1e-5)


def test_has_no_gradient_and_no_tensor_of_all_logits() -> None:
    of = head((96, 16, 4000))
    hidden = of["hidden"].requires_grad_()
    with LargestTensor() as largest:
        found = linear_topk(hidden, of["weight"], 3)
    assert not found.log_prob.requires_grad
    assert max(largest.sizes) < 96 * 4000


def test_fake_tensors_and_compilation() -> None:
    of = head((30, 16, 257))
    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(of[name]) for name in ("hidden", "weight"))
        assert linear_topk(hidden, weight, 3).token.shape == (30, 3)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_topk, fullgraph=True, backend=counter)
    for rows in (30, 17, 9, 28):
        own = linear_topk(of["hidden"][:rows], of["weight"], 3)
        assert torch.equal(compiled(of["hidden"][:rows], of["weight"], 3).token, own.token)
    assert counter.frame_count == 2  # for one number of rows, and then for any


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: expected an int in 1\.\.5, got 0"),
        ({"k": 6}, ValueError, r"k: expected an int in 1\.\.5, got 6"),
        ({"k": 1.0}, TypeError, "k: expected an int, got float"),
        ({"k": True}, TypeError, "k: expected an int, got bool"),
        ({"weight": torch.zeros(5, 2)}, ValueError, r"weight: expected shape \[V, H\].*H = 3"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"backend": "cpu"}, ValueError, "backend: expected one of 'auto', 'reference', got 'cpu'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    good = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "k": 2}
    with pytest.raises(error, match=message):
        linear_topk(**good | change)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    of = head((300, 64, 5000))
    found = linear_topk(of["hidden"].cuda(), of["weight"].cuda(), 7)
    true = log_probs(torch.float64, of).topk(7).values
    assert ((found.log_prob.cpu() - true).abs() < 1e-4).all()


def _settings(of: dict[str, Any]) -> dict[str, Any]:
    return {name: of[name] for name in ("bias", "temperature", "softcap")}

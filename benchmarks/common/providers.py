"""Who computes per-token log-probs at the LM head: ours, unfused torch, and the peers.

A provider is looked up by name, because the CPU memory of each is measured in a process of its
own, which has to find it again. One that is not installed or cannot run says why.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.problem import Problem, Shape, Solution, make_problem
from latro_kernels import linear_logprob

LogprobFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], target [N]) -> log-probs [N], differentiable in the first two."""

TINY = Shape("tiny", n=16, h=128, v=512)

CANNOT_RUN = (
    RuntimeError,  # includes NotImplementedError and torch.OutOfMemoryError
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)
"""What a provider raises where it cannot run: peers check their input by assert, too."""

BUDGETS = {"keep": 1 << 50, "3gib": 3 << 30, "64mib": 64 << 20, "recompute": 0}
"""memory_budget, in bytes, of `latro-BACKEND-NAME`: all logits are kept from forward to backward,
those that fit into 3 GiB or 64 MiB, or none."""

# Width of TRL's vocabulary tiles: what its trainers pass.
_TRL_CHUNK_SIZE = 32768


class UnavailableError(RuntimeError):
    """A provider cannot be had here; the message is the reason."""


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UnavailableError("not installed (pip install -e '.[bench]')")


def _require_gpu(device: torch.device, what: str = "its Triton kernel") -> None:
    if device.type != "cuda":
        raise UnavailableError(f"{what} needs a CUDA GPU")


def _unfused(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the log-probs by an fp32 log_softmax of whole logits."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def _ours(device: torch.device, *, backend: str, **options: object) -> LogprobFn:
    if backend in ("triton", "cuda"):
        _require_gpu(device, f"backend {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise UnavailableError("backend 'cpu' takes CPU tensors")
    return partial(linear_logprob, backend=backend, **options)


def _torch_chunked(device: torch.device) -> LogprobFn:
    """Find `F.linear_cross_entropy` with automatic chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} lacks it (torch >= 2.13 has it)")
    options = torch.nn.LinearCrossEntropyOptions()

    def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # It warns where it falls back to whole logits; that would not be the chunked loss.
            warnings.filterwarnings("error", message="linear_cross_entropy: ``options`` ignored")
            return -F.linear_cross_entropy(
                hidden, weight, target, reduction="none", options=options
            )

    return torch_chunked


def _trl(device: torch.device) -> LogprobFn:
    """Find TRL's chunked log-prob: Triton on a GPU, else tiles in torch."""
    _require("trl")
    from trl.kernels import ChunkedLogProbFunction

    def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        bias, temperature, softcap, scale, extra_outputs = None, 1.0, None, 1.0, ()
        # `apply` takes no keywords.
        return ChunkedLogProbFunction.apply(
            hidden,
            weight,
            bias,
            target,
            temperature,
            _TRL_CHUNK_SIZE,
            softcap,
            scale,
            extra_outputs,
        )[0]

    return trl


def _liger(device: torch.device) -> LogprobFn:
    """Find Liger's scaled cross-entropy: a kernel for sm_90, else chunks in torch."""
    _require("liger_kernel")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return _negated(LigerFusedLinearScaledCrossEntropyFunction.apply)


def _liger_flce(device: torch.device) -> LogprobFn:
    """Find Liger's fused linear cross-entropy."""
    _require("liger_kernel")
    _require_gpu(device)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _negated(liger_fused_linear_cross_entropy, reduction="none")


def _cce(device: torch.device, *, impl: str) -> LogprobFn:
    """Find cut-cross-entropy: its kernel with the gradient filter as shipped, or compiled torch."""
    _require("cut_cross_entropy")
    if impl == "cce":
        _require_gpu(device)
    from cut_cross_entropy import linear_cross_entropy

    return _negated(linear_cross_entropy, reduction="none", impl=impl)


def _negated(loss: LogprobFn, **options: object) -> LogprobFn:
    """Make log-probs of a cross-entropy."""
    return lambda hidden, weight, target: -loss(hidden, weight, target, **options)


Find = Callable[[torch.device], LogprobFn]
"""Find a provider's function, or raise an error of `CANNOT_RUN` with the reason."""

PROVIDERS: dict[str, Find] = {
    # Every backend with its default budget, and with each of `BUDGETS` if it has one.
    "latro-reference": partial(_ours, backend="reference"),
    **{
        f"latro-{backend}{suffix}": partial(_ours, backend=backend, **options)
        for backend in ("cpu", "triton", "cuda")
        for suffix, options in (
            ("", {}),
            *((f"-{name}", {"memory_budget": size}) for name, size in BUDGETS.items()),
        )
    },
    "unfused": lambda device: _unfused,
    "torch-chunked": _torch_chunked,
    "trl": _trl,
    "liger": _liger,
    "liger-flce": _liger_flce,
    "cce": partial(_cce, impl="cce"),
    "cce-compile": partial(_cce, impl="torch_compile"),
}
SLOW_START = ("cce-compile",)
"""Providers that compile for half a minute before their first result."""


def solve(logprob: LogprobFn, problem: Problem) -> Solution:
    """Solve `problem` with `logprob`: one forward, one backward."""
    logp = logprob(problem.hidden, problem.weight, problem.target)
    dx, *dw = torch.autograd.grad(logp, problem.differentiable, problem.grad.to(logp.dtype))
    return Solution(logp.detach(), dx, dw[0] if dw else None)


def discover(
    names: Iterable[str], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, LogprobFn], dict[str, str]]:
    """Find each named provider and try it, forward and backward, on a tiny problem.

    Returns:
        The functions of those that ran, and the reasons of those that did not, by name.

    Raises:
        ValueError: a name is not in `PROVIDERS`.
    """
    problem = make_problem(TINY, dtype, device)
    found: dict[str, LogprobFn] = {}
    reasons: dict[str, str] = {}
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"providers: expected some of {', '.join(PROVIDERS)}, got {name!r}")
        try:
            logprob = PROVIDERS[name](device)
            solve(logprob, problem)
        except CANNOT_RUN as error:
            reasons[name] = reason(error)
        else:
            found[name] = logprob
    return found, reasons


def reason(error: BaseException) -> str:
    """Say in one line why `error` stopped a provider."""
    if isinstance(error, UnavailableError):
        return str(error)
    message = str(error).strip()
    first_line = message.splitlines()[0] if message else "no message"
    return f"{type(error).__name__}: {first_line}"

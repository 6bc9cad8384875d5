"""Time the shapes of a block of products on this machine's GPU, and save the fastest.

    python -m latro_kernels.linear_logprob.triton.tuning --hidden 4096 --vocab 128256 --dtype bf16

It is saved in Triton's cache folder, which TRITON_CACHE_DIR, Triton's own variable, may move.
`blocks.config` looks there first, so that no call waits for a search. Shapes are timed in the
forward.

The warp-specialised form of sm_90 and sm_100 comes last, when the best of the others is saved: it
has never run on a GPU, and may hang. It is timed if its log-probs, entropies and gradients are
right, and saved if it makes forward and backward together, with no products kept, faster.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_logprob import reference
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted
from latro_kernels.linear_logprob.triton import blocks, fused
from latro_kernels.linear_logprob.triton.blocks import DTYPES, Config

# Of a form that has never run: an odd number, so that blocks are full and not, and how often its
# results have to come again.
_CHECKED_ROWS, _REPEATS = 333, 20


def problem(dtype: str, N: int, H: int, V: int) -> tuple[Head, Tensor]:
    """Return a random head on the GPU, and targets."""
    hidden, weight = (
        torch.randn(size, H, device="cuda", dtype=DTYPES[dtype]) / H**0.25 for size in (N, V)
    )
    target = torch.randint(V, (N,), device="cuda")
    head = Head(hidden, weight, bias=None, temperature=1.0, softcap=0.0, backend="triton")
    return head, target


def forward(head: Head, target: Tensor, config: Config, *, with_entropy: bool = False) -> State:
    """Return the state after a forward that keeps no products."""
    wanted = Wanted(with_entropy, dx_sum=False, block_max=False, memory_budget=0)
    state = fused.empty_state(head, target, wanted)
    fused.forward(head, state, config)
    return state


def solve(
    head: Head, target: Tensor, config: Config, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """Return log-probs, entropies if wished, and the gradients of the sum of them all."""
    state = forward(head, target, config, with_entropy=with_entropy)
    log_sum = state.sum_exp.log()
    found = {"logp": (state.target_logit - state.row_max) - log_sum}
    if state.weighted_sum is not None:
        found["entropy"] = log_sum - state.weighted_sum / state.sum_exp
    ones = torch.ones_like(log_sum)
    grad = RowGrad(
        target=target,
        logp=found["logp"],
        row_max=state.row_max,
        log_sum=log_sum,
        grad_logp=ones,
        grad_entropy=ones if with_entropy else None,
        offset=found.get("entropy"),
    )
    dx, dw, _ = fused.backward(
        head,
        grad,
        cached=state.cached,
        block_max=None,
        grad_filter=0.0,
        needs=(True, True, False),
        config=config,
    )
    assert dx is not None
    assert dw is not None
    return found | {"dx": dx, "dw": dw}


def measure(
    run: Callable[[Head, Tensor, Config], Any],
    head: Head,
    target: Tensor,
    candidates: Iterable[Config],
) -> list[tuple[float, Config]]:
    """Return the milliseconds of `forward` or `solve` with each shape that runs, fastest first."""
    timed = []
    for candidate in candidates:
        call = partial(run, head, target, candidate)
        try:
            timed.append((triton.testing.do_bench(call, return_mode="median"), candidate))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{candidate}: {error}")
    return sorted(timed, key=lambda pair: pair[0])


def truth(head: Head, target: Tensor, *, with_entropy: bool) -> dict[str, Tensor]:
    """Return what `solve` does, by the reference in fp64."""
    hidden, weight = (t.double().requires_grad_() for t in (head.hidden, head.weight))
    statistics = reference(hidden, weight, target)
    found = {"logp": statistics.logp}
    if with_entropy:
        assert statistics.entropy is not None
        found["entropy"] = statistics.entropy
    dx, dw = torch.autograd.grad(torch.stack([*found.values()]).sum(), (hidden, weight))
    return {name: values.detach() for name, values in found.items()} | {"dx": dx, "dw": dw}


def is_right(head: Head, target: Tensor, candidate: Config, trusted: Config) -> bool:
    """Return whether all that `solve` returns is the same in every run, and exact.

    Its largest errors against fp64 may be twice those of the trusted shape, plus 1e-5.
    """
    few = slice(0, _CHECKED_ROWS)
    head, target = replace(head, hidden=head.hidden[few]), target[few]
    for with_entropy in (False, True):
        exact = truth(head, target, with_entropy=with_entropy)

        def errors(found: dict[str, Tensor], exact: dict[str, Tensor] = exact) -> Tensor:
            return torch.stack([(found[name] - of).abs().max() for name, of in exact.items()])

        bound = 2 * errors(solve(head, target, trusted, with_entropy=with_entropy)) + 1e-5
        first = solve(head, target, candidate, with_entropy=with_entropy)
        # NaN is not below it.
        if not (errors(first) <= bound).all():
            return False
        for _ in range(_REPEATS):
            again = solve(head, target, candidate, with_entropy=with_entropy)
            if not all(torch.equal(first[name], again[name]) for name in first):
                return False
    return True


def save(key: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add an entry to those saved, in the place of one with the same key."""
    path = blocks.saved_path()
    others = [other for other in blocks.saved(path) if not key.items() <= other.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps([*others, entry], indent=1) + "\n")
    os.replace(beside, path)
    print(f"saved in {path}")


def show(timed: Iterable[tuple[float, Config]]) -> None:
    """Print what `measure` has returned."""
    for milliseconds, config in timed:
        print(f"{milliseconds:8.3f} ms  {config}", flush=True)


def main() -> None:
    """Time the shapes for one head, and save the fastest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, required=True, help="H")
    parser.add_argument("--vocab", type=int, required=True, help="V")
    parser.add_argument("--rows", type=int, default=8192, help="N (default 8192)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU to measure on")
    head, target = problem(args.dtype, args.rows, args.hidden, args.vocab)
    name, dtype = torch.cuda.get_device_name(), head.hidden.dtype
    key = {"device": name, "dtype": args.dtype, "H": args.hidden, "V": args.vocab}

    def keep(best: tuple[float, Config]) -> None:
        milliseconds, config = best
        entry = {"milliseconds": milliseconds, "rows": args.rows, "config": asdict(config)}
        save(key, key | entry)

    timed = measure(forward, head, target, blocks.candidates(dtype))
    show(timed)
    best = timed[0]
    keep(best)
    if blocks.can_warp_specialize(head.hidden.device, dtype):
        form = blocks.WARP_SPECIALIZED
        if not is_right(head, target, form, trusted=best[1]):
            parser.exit(1, f"{form}: its results are wrong, or not the same each time\n")
        print("forward and backward:")
        timed = measure(solve, head, target, [best[1], form])
        show(timed)
        if timed[0][1] == form:
            keep(measure(forward, head, target, [form])[0])


if __name__ == "__main__":
    main()

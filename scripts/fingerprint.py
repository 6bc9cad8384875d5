"""Print checksums of what the code computes, to hold two checkouts against each other bit by bit.

    python scripts/fingerprint.py > before.txt      # in one checkout
    python scripts/fingerprint.py > after.txt       # in the other, on the same machine
    diff before.txt after.txt

Each line is a checksum: of the outputs and gradients of an op on fixed inputs, by backend and
dtype, or of the metrics and the weights of a short run of the small model, for LaTRO by each
objective and for supervised fine-tuning. `--max_steps 120` takes the whole default run. The script
uses one thread, so that sums have one order, and public names only, which a redesign keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from latro_kernels import (
    GroupLayout,
    gather_logprob,
    group_advantage,
    linear_kl,
    linear_logprob,
    linear_sample,
)

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMES = ("time", "runtime", "per_second", "memory")
"""Parts of the names of metrics that differ from run to run."""


def checksum(tensors: Iterable[Tensor | None]) -> str:
    """Return a hash of the bits of `tensors`; of NaN the bits count too."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
        else:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def ops() -> Iterator[tuple[str, str]]:
    """Yield checksums of the ops, forward and backward."""
    for backend in BACKENDS:
        for dtype in DTYPES:
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            yield f"linear_logprob {name}", checksum(_linear_logprob(backend, dtype))
            yield f"gather_logprob {name}", checksum(_gather_logprob(backend, dtype))
            yield f"linear_kl {name}", checksum(_linear_kl(backend, dtype))
            yield f"linear_sample {name}", checksum(_linear_sample(backend, dtype))
        yield f"group_advantage {backend}", checksum(_group_advantage(backend))


def _inputs(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _linear_logprob(backend: str, dtype: torch.dtype) -> list[Tensor]:
    results: list[Tensor] = []
    for options in ({}, {"temperature": 0.7, "softcap": 5.0}, {"memory_budget": 0}):
        for frozen in (False, True):
            hidden, weight, bias = _inputs(dtype, (37, 33), (1003, 33), (1003,))
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            target = torch.arange(37) * 27
            logp, entropy = linear_logprob(
                hidden, weight, target, bias=bias, return_entropy=True, backend=backend, **options
            )
            (logp.sin().sum() + 0.1 * entropy.sum()).backward()
            results += [logp, entropy, hidden.grad]
            results += [] if frozen else [weight.grad, bias.grad]
    return results


def _gather_logprob(backend: str, dtype: torch.dtype) -> list[Tensor]:
    (logits,) = _inputs(dtype, (37, 1003))
    target = torch.arange(37) * 27
    logp, entropy = gather_logprob(logits, target, return_entropy=True, backend=backend)
    (logp.sin().sum() + 0.1 * entropy.sum()).backward()
    return [logp, entropy, logits.grad]


def _linear_kl(backend: str, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((37, 33), (1003, 33), (37, 17), (1003, 17))
    hidden_p, weight_p, hidden_q, weight_q = _inputs(dtype, *shapes)
    kl = linear_kl(hidden_p, weight_p, hidden_q.detach(), weight_q.detach(), backend=backend)
    kl.sin().sum().backward()
    return [kl, hidden_p.grad, weight_p.grad]


def _linear_sample(backend: str, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, bias = _inputs(dtype, (137, 33), (1003, 33), (1003,))
    seed, position = torch.arange(137) * 2**40, torch.arange(137)
    results: list[Tensor] = []
    for temperature in (0.0, 0.7):
        results += linear_sample(
            hidden, weight, seed, position, bias=bias, temperature=temperature, backend=backend
        )
    return results


def _group_advantage(backend: str) -> list[Tensor | None]:
    lengths = torch.tensor([3, 2, 0, 1, 5, 2, 2, 2, 7, 3, 1, 4, 2, 2, 6, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = int(offsets[-1])
    logp, ref_logp, row_kl = (
        -t.detach().abs() for t in _inputs(torch.float32, (rows,), (rows,), (rows,))
    )
    finished = torch.tensor([True, False, True, True, False, True, False, False])
    layout = GroupLayout(offsets=offsets, num_generations=4, finished=finished)
    results: list[Tensor | None] = []
    for kl in ("reward", "k3", "exact"):
        exact = {"ref_logp": None, "row_kl": -row_kl} if kl == "exact" else {"ref_logp": ref_logp}
        out = group_advantage(logp, layout=layout, beta=0.05, kl=kl, backend=backend, **exact)
        results += [out.advantage, out.coefficient, out.kl_coefficient]
    return results


def runs(max_steps: int) -> Iterator[tuple[str, str]]:
    """Yield checksums of short runs of the small model."""
    from latro.objectives import OBJECTIVES
    from latro.sft import sft
    from latro.train import train

    small = ["--num_train_examples", "64", "--num_eval_examples", "16", "--save_strategy", "no"]
    small += ["--disable_tqdm", "true", "--use_cpu", "true", "--max_steps", str(max_steps)]
    settings: dict[str, tuple[Any, list[str]]] = {"sft": (sft, [])}
    settings |= {f"latro {name}": (train, ["--objective", name]) for name in OBJECTIVES}
    settings |= {f"latro kl {kl}": (train, ["--kl", kl]) for kl in ("k3", "exact")}
    settings["latro pieces"] = (train, ["--token_budget", "200"])
    for name, (command, argv) in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(sys.stderr):
                command([*small, *argv, "--output_dir", f"{folder}/run"])
            yield f"{name}: weights", _weights(f"{folder}/run")
            yield f"{name}: metrics", _metrics(f"{folder}/run/metrics.jsonl")


def _weights(folder: str) -> str:
    from safetensors.torch import load_file

    weights = load_file(f"{folder}/model.safetensors")
    return checksum(weights[name] for name in sorted(weights))


def _metrics(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = {
                name: value
                for name, value in json.loads(line).items()
                if not any(part in name for part in TIMES)
            }
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--max_steps", type=int, default=4, help="updates of each run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for results in (ops(), runs(args.max_steps)):
        for name, value in results:
            print(f"{name}: {value}", flush=True)


if __name__ == "__main__":
    main()

"""Writes the README's tables from the results that stand in the repository.

    python scripts/readme_tables.py            # rewrite the README
    python scripts/readme_tables.py --check    # exit 1 where it differs

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_SHAPE = "cpu-1k"


def default_run(result: dict[str, Any]) -> str:
    """Accuracy before and after the default run, a row a seed."""
    base = result["runs"][0]["base"]
    rows = [
        [
            "the model that ships",
            f"{base['eval_accuracy_greedy']:.1%}",
            f"{base['eval_accuracy_sampled']:.1%}",
            f"{base['eval_rationale_length']:.1f}",
            f"{base['eval_answer_logp']:.2f}",
            "",
        ]
    ]
    for run in result["runs"]:
        final = run["final"]
        rows.append(
            [
                f"after LaTRO, seed {run['seed']}",
                f"{final['eval_accuracy_greedy']:.1%}",
                f"{final['eval_accuracy_sampled']:.1%}",
                f"{final['eval_rationale_length']:.1f}",
                f"{final['eval_answer_logp']:.2f}",
                f"{run['seconds']:.0f}",
            ]
        )
    header = ["500 held-out problems", "greedy", "sampled", "rationale, tokens"]
    header += ["mean log π(y \\| x⊕z)", "seconds in all"]
    seeds = " ".join(str(run["seed"]) for run in result["runs"])
    return (
        markdown(header, rows)
        + f"\n\n`python benchmarks/default_run.py --seeds {seeds}` on {_where(result)}. The first "
        "row was measured with the first seed's samples."
    )


def logprob_cpu(result: dict[str, Any]) -> str:
    """Every provider at the shape that has goals, fp32 and bf16."""
    tables = []
    for dtype in ("fp32", "bf16"):
        rows = [
            [
                row["provider"],
                f"{row['multiples']['forward']:.2f}",
                f"{row['multiples']['full']:.2f}",
                _mib(row["memory"]["full"]),
                _error(row["error"]["logp"]),
                _error(row["error"]["dx_peaked"]),
                _error(row["error"]["dw"]),
            ]
            for row in result["rows"]
            if row["shape"]["name"] == _SHAPE and row["dtype"] == dtype
        ]
        header = [f"{dtype}", "forward, × GEMM", "full, × 3 GEMMs", "extra memory, MiB"]
        header += ["error logp", "error dX, peaked rows", "error dW"]
        tables.append(markdown(header, rows))
    reps = [row["times"]["full"]["reps"] for row in result["rows"]]
    shape = next(r["shape"] for r in result["rows"] if r["shape"]["name"] == _SHAPE)
    missing = "".join(f"\n- {line}" for line in result["cannot_run"])
    return (
        "\n\n".join(tables)
        + f"\n\nN = {shape['n']}, H = {shape['h']}, V = {shape['v']}; medians of {min(reps)} or "
        f"more interleaved repetitions on {_where(result)}; ranges in "
        "[the results](benchmarks/results/cpu). Not run here:\n" + missing
    )


TABLES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "default-run": (RESULTS / "default_run.json", default_run),
    "logprob-cpu": (RESULTS / "cpu" / "logprob.json", logprob_cpu),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def render(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        ValueError: a table's markers are missing.
    """
    for name, (path, table) in TABLES.items():
        block = f"<!-- begin {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->\n.*?<!-- end {name} -->"
        text, count = re.subn(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md: expected one pair of markers of {name}, got {count}")
    return text


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old)
    if not args.check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("README.md: a table differs from its results; run scripts/readme_tables.py")


if __name__ == "__main__":
    main()

"""Write the tables of the README and of docs/ from the results that stand in the repository.

    python scripts/readme_tables.py            # rewrite the pages
    python scripts/readme_tables.py --check    # exit 1 where one differs

A table stands on any number of pages. `kernel_tables.py` makes those of the kernels,
`training_tables.py` those of training.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from scripts import kernel_tables, training_tables
from scripts.tables import ROOT, fill, rewrite
from studies.records import CELLS_FILE

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "integrations.md",
    ROOT / "docs" / "results.md",
)
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "default-run": ("default_run.json", training_tables.default_run),
    "default-run-short": ("default_run.json", training_tables.default_run_short),
    "peers-short": ("head/study_head.json", kernel_tables.peers_short),
    "step-short": ("step/step.json", training_tables.step_short),
    "peers": ("head/study_head.json", kernel_tables.peers),
    "ops": ("ops/ops.json", kernel_tables.ops),
    "sample": ("linear_sample/linear_sample.json", kernel_tables.sample),
    "predicted": ("gpu/compiled.json", kernel_tables.predicted),
    "step": ("step/step.json", training_tables.step),
    "step-smollm2": (
        "step_smollm2/step.json",
        partial(training_tables.step, folder="step_smollm2"),
    ),
    "step-gemma": ("step_gemma/step.json", partial(training_tables.step, folder="step_gemma")),
    "shared-prefix": ("trl/shared_prefix.json", training_tables.shared_prefix),
    "trl-step": ("trl/step.json", training_tables.trl_step),
    "rollout": ("rollout/rollout_smollm2.json", training_tables.rollout),
    "head-study": ("head/study_head.json", kernel_tables.head_study),
    "replicate": (f"replicate/{CELLS_FILE}", training_tables.replicate),
}
"""By name of a table: the file of its results within `RESULTS`, and what makes it of them."""


def render(text: str, page: Path) -> str:
    """Return a page with each table that it has made anew.

    Raises:
        ValueError: markers of an unknown table, or not in pairs.
    """
    here = os.path.relpath(ROOT, page.parent)
    tables = {}
    for name in re.findall(r"<!-- (?:begin|end) (.+) -->", text):
        if name not in TABLES:
            raise ValueError(f"{page.name}: expected a table of {', '.join(TABLES)}, got {name!r}")
        result, make = TABLES[name]
        # Links are written as from the repository's root.
        prefix = "](" if here == os.curdir else f"]({here}/"
        tables[name] = make(json.loads((RESULTS / result).read_text(encoding="utf-8"))).replace(
            "](", prefix
        )
    return fill(text, tables, page.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables of README and docs/, or check them."""
    rewrite(PAGES, render, __doc__, argv)


if __name__ == "__main__":
    main()

"""A session of pytest in Triton's interpreter, in a process of its own.

TRITON_INTERPRET is read when a kernel is defined, and in interpreter mode nothing can be compiled:
the tests that compile the same kernels need a session without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    *("test_accuracy.py", "test_torch.py", "test_linear_logprob.py", "test_gather_logprob.py"),
    *("test_linear_kl.py", "test_group_advantage.py", "test_linear_sample.py"),
    *("test_row_statistics.py", "interpreted"),
)


def run(names: str) -> None:
    """Run the tests for the interpreter whose names match the expression `names`."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreted", "-k", names]
    result = subprocess.run(
        [*command, *(str(HERE / file) for file in FILES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout, result.stdout

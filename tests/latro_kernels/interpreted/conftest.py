"""Collected in Triton's interpreter only: `test_triton_interpreted.py` runs these tests."""

from __future__ import annotations

try:
    import triton
except ModuleNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore_glob = [] if triton.knobs.runtime.interpret else ["test_*.py"]

from __future__ import annotations

from pathlib import Path

import pytest

from tests.warm_process import WarmProcess

pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

ROOT = Path(__file__).parents[2]
THEIRS = """
import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils


def test_trainers_get_ours():
    assert utils._ChunkedLogProbFunction.__name__ == "LinearLogprob"


def test_the_function_that_a_module_imported_is_ours():
    for dtype in (torch.float32, torch.float64):
        hidden, weight = torch.ones(2, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
        target = torch.tensor([0, 4])
        logp, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8)
        torch.testing.assert_close(logp.exp(), torch.full([2], 0.2))
"""


def test_tests_of_trl_run_with_ours_and_the_calls_are_counted(
    tmp_path: Path, warm: WarmProcess
) -> None:
    """The call in fp64 is left to TRL's own."""
    path = tmp_path / "test_theirs.py"
    path.write_text(THEIRS)
    command = str(Path(pytest.__file__).with_name("__main__.py"))
    options = ("-p", "scripts.patched_trl", "-c", "/dev/null")
    done = warm.start(command, [*options, path], tmp_path / "printed", cwd=ROOT).wait(240)
    assert "patch_trl: 2 calls, of which 1 went on to TRL's own" in done.stdout, done.stdout
    assert done.code == 0

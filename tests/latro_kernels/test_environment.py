"""Where numbers were measured."""

from __future__ import annotations

import json
import platform

import torch

from latro_kernels import environment


def test_versions_and_device_are_named():
    where = environment(torch.device("cpu"), ("torch", "no-such-package"))
    assert where["torch"] == torch.__version__
    assert where["python"] == platform.python_version()
    assert where["threads"] == torch.get_num_threads()
    assert where["no-such-package"] is None
    assert torch.backends.cpu.get_cpu_capability() in where["device"]
    assert json.loads(json.dumps(where)) == where

"""The package for Hugging Face's `kernels`: whole, alone in its namespace, and loaded by it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import latro_kernels
from scripts import hub_kernel

# What the package computes in Triton's interpreter has the bits of what `latro_kernels` computes.
LOADED = """
import sys
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm

package = get_local_kernel(Path(sys.argv[1]))
assert "latro_kernels" not in sys.modules
(loaded,) = get_loaded_kernels()
assert loaded.metadata.id == package.__name__, loaded.metadata
build = Path(package.__file__).parent
for cached in build.rglob("__pycache__"):
    for file in cached.iterdir():
        file.unlink()
    cached.rmdir()
(build / "metadata.json").rename(build.parent / "metadata.json")
loaded.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))

import latro_kernels


def results(module):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, generator=random, requires_grad=True)
    weight = torch.randn(70, 16, generator=random, requires_grad=True)
    others = torch.randn(6, 16, generator=random), torch.randn(70, 16, generator=random)
    target = torch.randint(70, (6,), generator=random)
    logp = module.linear_logprob(hidden, weight, target, backend="triton")
    row_kl = module.linear_kl(hidden, weight, *others, backend="triton")
    of_logits = module.gather_logprob(hidden @ weight.T, target, backend="triton")
    given = {"seed": torch.arange(6), "position": torch.arange(6), "backend": "triton"}
    drawn = module.linear_sample(hidden.detach(), weight.detach(), **given)
    layout = module.GroupLayout(torch.tensor([0, 2, 3, 5, 6]), num_generations=2)
    group = module.group_advantage(logp.detach(), None, layout, beta=0.0, backend="triton")
    (logp + row_kl + of_logits).sum().backward()
    gradients = [hidden.grad, weight.grad]
    return [logp, row_kl, of_logits, drawn.token, drawn.logp, group.coefficient, *gradients]


for ours, theirs in zip(results(latro_kernels), results(package), strict=True):
    assert torch.equal(ours, theirs)
assert package.linear_logprob is not latro_kernels.linear_logprob
assert getattr(torch.ops, package.__name__).linear_logprob
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the package's one build."""
    return hub_kernel.write(tmp_path_factory.mktemp("hub"))


def modules(build: Path) -> dict[Path, ast.Module]:
    """Return the syntax trees of the modules."""
    return {path: ast.parse(path.read_text()) for path in build.rglob("*.py")}


def test_it_exports_what_runs_on_a_gpu(build: Path) -> None:
    (exported,) = [
        node.value
        for node in modules(build)[build / "__init__.py"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    on_cpus = {"DecodedRows", "KeptKeys", "decode_attention", "few_rows_linear"}
    assert set(latro_kernels.__all__) - set(ast.literal_eval(exported)) == on_cpus


def test_it_imports_torch_triton_and_itself_alone(build: Path) -> None:
    outside = set()
    for path, tree in modules(build).items():
        for_checkers = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
        }
        for node in ast.walk(tree):
            if node in for_checkers:
                continue
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert folder.is_relative_to(build)
                assert folder.with_suffix(".py").exists() or (folder / "__init__.py").exists(), path
    assert outside - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_its_operators_have_a_namespace_of_their_own(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identifier = json.loads((build / "metadata.json").read_text())["id"]
    assert identifier.isidentifier()
    for path, tree in modules(build).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and "::" in str(node.value):
                assert str(node.value).startswith(f"{identifier}::"), path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
                assert node.attr == identifier, path
    assert (
        hub_kernel.write(tmp_path / "again").joinpath("metadata.json").read_bytes()
        == (build / "metadata.json").read_bytes()
    )
    shutil.copytree(hub_kernel.SOURCE, tmp_path / "changed", ignore=shutil.ignore_patterns("*.so"))
    with (tmp_path / "changed/checks.py").open("a") as file:
        file.write("# another version\n")
    monkeypatch.setattr(hub_kernel, "SOURCE", tmp_path / "changed")
    changed = hub_kernel.write(tmp_path / "other")
    assert json.loads((changed / "metadata.json").read_text())["id"] != identifier


def test_a_folder_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hub_kernel.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        hub_kernel.main()
    assert not list(tmp_path.iterdir())


def test_kernels_loads_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("needs the package kernels: CONTRIBUTING.md says how")
    hub_kernel.write(tmp_path / "hub")
    result = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path / "hub")],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_no_part(
    tmp_path, monkeypatch, capsys
):
    def half(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_kernel, "write", half)
    monkeypatch.setattr("sys.argv", ["hub_kernel.py", "--output_dir", str(tmp_path / "hub")])
    with pytest.raises(SystemExit):
        hub_kernel.main()
    assert "hub cannot be written: No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())

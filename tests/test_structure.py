"""Read from the source which layers import which, how functions are called, where things are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"assets", "objectives", "terminal", "worker"},
    {"errors"},
    {"files"},
    {"rollout"},
    {"tasks"},
    {"config"},
    {"model"},
    {"run"},
    {"engines", "update"},
    {"integrations"},
    {"evaluation"},
    {"reporting"},
    {"loading", "problems"},
    {"evaluating_trainer"},
    {"base_trainer"},
    {"sampling_trainer", "sft_trainer"},
    {"trainer"},
    {"cli"},
    {"evaluate", "probe", "sft", "train"},
)
"""The rooms of `latro`, lowest first: each imports only rooms of the lines before it."""
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
SOURCES = sorted(
    path
    for folder in ("latro", "latro_kernels", "studies", "benchmarks", "scripts", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
MOST_POSITIONAL = 8
NEWER_THAN_3_10 = {
    *("tomllib", "datetime.UTC", "enum.StrEnum", "itertools.batched", "contextlib.chdir"),
    *("typing." + name for name in ("Self", "Never", "LiteralString", "Required", "NotRequired")),
    *("typing." + name for name in ("Unpack", "TypeVarTuple", "assert_never", "override")),
}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = CONTRIBUTING.partition("\n## Where things are\n")[2].partition("\n## ")[0]
NAMED_EACH = ("csrc/cpu/*.h", "latro/*.py", "latro_kernels/*.py", "benchmarks/*.py")
NAMED_EACH += ("scripts/*.py", "studies/*.py")
"""Files that the map names one by one; of other folders it names those to begin with."""
OVERRIDDEN = {"create_model_card"}
"""Methods whose arguments transformers determines."""


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of this repository that a module imports, even inside functions."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # A name may be a module of the package it is imported from; the kernels' package has
            # functions by the names of its modules.
            found = [
                base
                if f"{base}.{alias.name}" not in MODULES
                or (base == "latro_kernels" and not name.startswith("latro_kernels."))
                else f"{base}.{alias.name}"
                for alias in node.names
            ]
        else:
            continue
        yield from (module for module in found if module in MODULES and module != name)


IMPORTS = {name: sorted(set(imported(path))) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("latro.")], ids=str)
def test_a_room_imports_only_rooms_below_it(module):
    room = room_of(module)
    assert room in RANK, f"{room} stands in no layer"
    for other in IMPORTS[module]:
        if other.startswith("latro.") and room_of(other) != room:
            assert RANK[room_of(other)] < RANK[room], f"{module} imports {other}"


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_the_trainer_imports_public_names_of_the_kernels_only():
    for module, others in IMPORTS.items():
        if module.split(".")[0] == "latro":
            inner = [
                other
                for other in others
                if other.startswith("latro_kernels.")
                and not other.startswith("latro_kernels.integrations.")
            ]
            assert not inner, f"{module} imports {inner}"


def test_the_kernels_import_nothing_of_ours():
    for module, others in IMPORTS.items():
        if module.split(".")[0] == "latro_kernels":
            assert all(other.split(".")[0] == "latro_kernels" for other in others), module


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_call_hides_its_arguments_in_a_starred_tuple(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            hidden = [
                argument
                for argument in node.args
                if isinstance(argument, ast.Starred)
                and isinstance(argument.value, (ast.Tuple, ast.List))
            ]
            assert not hidden, f"{path.name}, line {node.lineno}: name the arguments"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_takes_more_than_eight_positional_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or _is_kernel(node):
            continue
        positional = [a.arg for a in node.args.posonlyargs + node.args.args]
        positional = [name for name in positional if name not in ("self", "cls")]
        if node.name in OVERRIDDEN:
            continue
        assert len(positional) <= MOST_POSITIONAL, f"{path.name}, line {node.lineno}: {node.name}"


def _is_kernel(node: ast.FunctionDef) -> bool:
    """Return whether Triton compiles a function or torch calls it, which set its parameters."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    compiled = ("triton.jit", "gluon.jit", "torch.library")
    return any(name in text for text in decorators for name in compiled)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_imported_is_there_in_python_3_10(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            newer = {f"{node.module}.{alias.name}" for alias in node.names} & NEWER_THAN_3_10
        elif isinstance(node, ast.Import):
            newer = {alias.name for alias in node.names} & NEWER_THAN_3_10
        else:
            continue
        assert not newer, f"{path.name}, line {node.lineno}: {newer}"


def test_the_map_names_every_folder_and_the_files_that_stand_outside_of_them():
    files = {path for pattern in NAMED_EACH for path in ROOT.glob(pattern)}
    folders = {path.parent for path in SOURCES} - {path.parent for path in files}
    names = {path.name for path in files if not path.name.startswith("__")}
    names |= {f"{folder.name}/" for folder in folders}
    assert not {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}", MAP)}


def test_what_the_map_names_is_there():
    names = re.findall(r"[\w*][\w*/-]*\.(?:py|h|cuh|md|yml)\b|\w[\w/]*/(?=\s)", MAP)
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name != ".git"]
    missing = {
        name
        for name in names
        if not (ROOT / name).exists() and not any(any(room.rglob(name)) for room in rooms)
    }
    assert len(names) > 100
    assert not missing

"""Write the Triton kernels as a package for Hugging Face's library `kernels`.

    python scripts/hub_kernel.py --output_dir dist/hub

The folder is what a kernel repository on the hub holds: `build/torch-universal`, in which nothing
is compiled, and a card. The sources are those of `latro_kernels`, without the ops that run on a CPU
alone and without the integrations. `kernels` loads a package from any path, under a name of its
own, and several versions in one process; so imports become relative, and torch's ops get a
namespace that is a checksum of the sources.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "latro_kernels"
LEFT_OUT = ("decode_attention", "few_rows_linear", "integrations")
# Of the functions that the package exports; 0 says that they may still change.
VERSION = 0
CARD = """---
library_name: kernels
license: apache-2.0
---

# latro-kernels

Triton kernels for per-token log-probabilities, entropy, KL and samples at a language model's LM
head, without a tensor of logits, and for rewards and advantages over K samples per prompt.

```python
import torch
from kernels import get_kernel

latro_kernels = get_kernel("<owner>/latro-kernels", version={version})
hidden = torch.randn(9, 64, device="cuda", requires_grad=True)
weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
target = torch.randint(1000, (9,), device="cuda")
latro_kernels.linear_logprob(hidden, weight, target).sum().backward()
```

On a CPU, `backend="reference"` is plain PyTorch; the C++ kernels come with the package
`latro-kernels`. It exports:

{functions}
"""


def sources() -> dict[str, str]:
    """Return the text of each module of the package, by its path."""
    paths = {path: path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py"))}
    texts = {
        p.as_posix(): path.read_text(encoding="utf-8")
        for path, p in paths.items()
        if p.parts[0] not in LEFT_OUT
    }
    texts["__init__.py"] = _without_left_out(texts["__init__.py"])
    return {path: _relative(text, depth=path.count("/")) for path, text in texts.items()}


def _without_left_out(text: str) -> str:
    """Return the package's `__init__` without the names of what is left out."""
    left_out = rf"^from latro_kernels\.(?:{'|'.join(LEFT_OUT)})[\w.]* import (\([^)]*\)|.*)\n"
    for names in re.findall(left_out, text, flags=re.MULTILINE):
        for name in re.findall(r"\w+", names):
            text = text.replace(f'    "{name}",\n', "")
    return re.sub(left_out, "", text, flags=re.MULTILINE)


def _relative(text: str, depth: int) -> str:
    """Return a module's text with imports of the package that begin at its own folder."""
    return re.sub(
        r"^( *from )latro_kernels(?:\.([\w.]+))?( import )",
        lambda m: f"{m[1]}.{'.' * depth}{m[2] or ''}{m[3]}",
        text,
        flags=re.MULTILINE,
    )


def write(folder: Path) -> Path:
    """Write the repository to `folder`, and return the folder of its one build in it."""
    texts = sources()
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    # A module's name for `kernels`, and the namespace of the ops.
    identifier = f"_latro_kernels_cuda_{digest[:8]}"
    build = folder / "build/torch-universal"
    checksums = {}
    for path, source in texts.items():
        text = re.sub(r"\blatro_kernels(?=::)|(?<=torch\.ops\.)latro_kernels\b", identifier, source)
        (build / path).parent.mkdir(parents=True, exist_ok=True)
        (build / path).write_text(text, encoding="utf-8")
        checksums[path] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    metadata = {
        "name": "latro-kernels",
        "id": identifier,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": checksums},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    exported = re.findall(r'^    "(\w+)",$', texts["__init__.py"], flags=re.MULTILINE)
    card = CARD.format(version=VERSION, functions="\n".join(f"- `{name}`" for name in exported))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return build


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that is not there")
    folder = parser.parse_args().output_dir
    if folder.exists():
        parser.error(f"--output_dir: expected a folder that is not there, got {folder}")
    try:
        print(write(folder))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # which was not there before
        parser.error(f"--output_dir: {folder} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()

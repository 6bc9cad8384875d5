"""Write the lines of an evaluation as it runs, and resume a killed evaluation from them.

`evaluation.jsonl` has one line per problem, in the order of the dataset, and nothing else.
`evaluation.settings.json` beside it identifies the evaluation: the model with its config and a
checksum of its weights, the data with checksums of rows and prompts, the settings. Where all of it
is the same, an evaluation continues after the existing lines at the start of a batch, and ends with
the same bits as one that was never stopped; where it differs, the evaluation is refused.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latro.files import append, finite, write_json
from latro.run.identity import as_json


class Journal:
    """A file of lines that grows batch by batch.

    Args:
        path: the `.jsonl` file.
        identity: what identifies the evaluation, as sections of JSON values by name.
        overwrite: whether to start anew, whatever evaluation the existing lines belong to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Mapping[str, Any]],
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.settings_path = self.path.with_suffix(".settings.json")
        self.identity = identity
        self.overwrite = overwrite

    def open(self, prompts: Iterable[Sequence[int]], batch_size: int) -> list[dict[str, Any]]:
        """Return the existing records up to the last whole batch, and drop later ones.

        Args:
            prompts: token ids of all problems, as the model reads them.
            batch_size: number of problems that are written together.

        Raises:
            ValueError: the lines belong to another evaluation, or a line before the last is
                damaged; or no evaluation wrote the file, which `overwrite` does not touch either.
        """
        checksum, count = crc32_of_each(prompts)
        identity = as_json({**self.identity, "prompts": {"crc32": checksum}})
        if self.path.exists() and not self.settings_path.exists():
            raise ValueError(
                f"output: {self.path} is there without {self.settings_path.name}, which would say "
                "that an evaluation wrote it; name another file"
            )
        if self.overwrite or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Deleted first: neither may ever stand beside settings of another evaluation.
            self.path.unlink(missing_ok=True)
            if self.settings_path.exists():
                self.path.with_suffix(".json").unlink(missing_ok=True)
            write_json(self.settings_path, identity)
            self.path.touch()
            return []
        self._check(identity)
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if len(lines) < count:
            del lines[len(lines) - len(lines) % batch_size :]
        records = [self._record(line, index) for index, line in enumerate(lines)]
        os.truncate(self.path, sum(map(len, lines)))
        return records

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the lines of a batch, so that they survive the process and a power failure."""
        lines = (json.dumps(finite(dict(r)), ensure_ascii=False) + "\n" for r in records)
        append(self.path, "".join(lines), durable=True)

    def _check(self, identity: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            there = json.loads(self.settings_path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"output: {self.settings_path}: not JSON: {error}") from error
        if there == identity:
            return
        if not isinstance(there, dict) or not all(isinstance(s, dict) for s in there.values()):
            raise ValueError(f"output: {self.settings_path}: expected what an evaluation wrote")
        names = sorted(
            {
                (section, name)
                for tree in (there, identity)
                for section in tree
                for name in tree[section]
            }
        )
        different = [
            f"{section}.{name} {there.get(section, {}).get(name)!r} there, "
            f"{identity.get(section, {}).get(name)!r} here"
            for section, name in names
            if there.get(section, {}).get(name) != identity.get(section, {}).get(name)
        ]
        raise ValueError(
            f"output: {self.path} is of another evaluation: {'; '.join(different)}; name another "
            "file, or pass --overwrite true to start anew"
        )

    def _record(self, line: bytes, index: int) -> dict[str, Any]:
        try:
            record = json.loads(line, object_hook=_with_infinite)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"output: {self.path}:{index + 1}: not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("index") != index:
            raise ValueError(f"output: {self.path}:{index + 1}: expected problem {index}")
        return record


def _with_infinite(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an object of a line with the −∞ of impossible answers, which JSON lacks."""
    return {n: -math.inf if v is None and n.endswith("logp") else v for n, v in entry.items()}


def crc32_of_each(values: Iterable[Any]) -> tuple[str, int]:
    """Return the checksum of a list of JSON values, and its length.

    The list is never held as a whole: that of all prompts' ids takes 30 bytes a token and more.
    """
    checksum = zlib.crc32(b"[")
    count = 0
    for count, value in enumerate(values, start=1):
        checksum = zlib.crc32(("" if count == 1 else ", ").encode(), checksum)
        checksum = zlib.crc32(json.dumps(value).encode(), checksum)
    return f"{zlib.crc32(b']', checksum):08x}", count


def weights_crc32(model: nn.Module) -> str:
    """Return the checksum of a model's weights, in the order of its state dict."""
    checksum = 0
    for name, tensor in model.state_dict().items():
        checksum = zlib.crc32(name.encode(), checksum)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), checksum)
    return f"{checksum:08x}"

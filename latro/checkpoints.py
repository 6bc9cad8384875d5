"""Checkpoint folders that are there whole or not at all, and that show what damaged them later.

A checkpoint is written under `.partial/` in the run's folder and renamed to `checkpoint-N` when all
of it stands there, the manifest last; a checkpoint that goes is renamed away before it is deleted.
So no crash leaves half a `checkpoint-N`. What a disk or a copy does to one afterwards is found by
the manifest, `checkpoint_manifest.json`:

    {"files": {"model.safetensors": {"bytes": 3639592, "crc32": "1c291ca3"}, ...}}

A CRC-32 finds every short burst of wrong bits, and misses other damage in one case of 2³²; it is as
fast as a disk, and no guard against intent.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from latro.files import write_json

MANIFEST = "checkpoint_manifest.json"
PARTIAL = ".partial"

_logger = logging.getLogger(__name__)


def last_whole_checkpoint(output_dir: str) -> str:
    """The newest checkpoint folder without damage; each newer one is named in a warning, and why.

    Raises:
        ValueError: there is none, or that one cannot be resumed from.
    """
    for folder in _newest_first(Path(output_dir)):
        fault = damage(folder)
        if fault is None:
            check_optimizer_state(str(folder))
            return str(folder)
        _logger.warning("%s is damaged and left out: %s", folder, fault)
    raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {output_dir}")


def check_checkpoint(folder: str) -> None:
    """Refuse a checkpoint folder that cannot be resumed from as it was saved.

    Raises:
        ValueError: it is no checkpoint, damaged (the message names the file), or of weights alone.
    """
    if not (Path(folder) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint folder, got {folder!r}, which has no "
            "trainer_state.json"
        )
    fault = damage(Path(folder))
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is damaged: {fault}. With true instead of a folder "
            "the newest whole checkpoint is taken"
        )
    check_optimizer_state(folder)


def check_optimizer_state(folder: str) -> None:
    """Refuse a checkpoint without the state of optimiser and schedule.

    The Trainer would begin both anew, and say nothing.

    Raises:
        ValueError: there is none, neither a Trainer's nor FSDP's nor DeepSpeed's.
    """
    place = Path(folder)
    # FSDP has `optimizer.bin` or a folder `optimizer_0`; DeepSpeed keeps all in `global_step<N>`.
    whole = any(place.glob("optimizer*")) and (place / "scheduler.pt").is_file()
    if not whole and not any(place.glob("global_step*")):
        raise ValueError(
            f"resume_from_checkpoint: {folder} lacks the state of optimiser or schedule, as with "
            "save_only_model; a run cannot go on from it. To train its weights further in a run of "
            "its own, name it as the model"
        )


def damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, and how; None: all of them are.

    A checkpoint without manifest, as Trainers write them, is taken if its `trainer_state.json`, its
    last file, can be read and its safetensors have the size that their headers tell.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {
            str(name): (int(entry["bytes"]), str(entry["crc32"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        return _damage_by_headers(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: cannot be read ({error!r})"
    # Sizes first: a missing or short file is told without reading the large ones.
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != size:
            return f"{name}: {path.stat().st_size:,} bytes, expected {size:,}"
    for name, (_, checksum) in files.items():
        found = _crc32(folder / name)
        if found != checksum:
            return f"{name}: its CRC-32 is {found}, expected {checksum}"
    return None


def _damage_by_headers(folder: Path) -> str | None:
    try:
        json.loads((folder / "trainer_state.json").read_bytes())
    except FileNotFoundError:
        return "trainer_state.json: missing"
    except ValueError as error:
        return f"trainer_state.json: not JSON ({error})"
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            expected = _safetensors_bytes(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path.relative_to(folder)}: its header cannot be read ({error!r})"
        if path.stat().st_size != expected:
            return (
                f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes, expected {expected:,}"
            )
    return None


def _safetensors_bytes(path: Path) -> int:
    """The size by the header: its length in 8 little-endian bytes, JSON, then the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length:,} bytes")
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _crc32(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def write_manifest(folder: Path) -> None:
    """Note every file of a checkpoint, its size and checksum."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def publish(folder: Path, run_dir: Path) -> Path:
    """Give a checkpoint under `.partial/`, all written, its manifest and its place in `run_dir`.

    A checkpoint of the same step, of before the run was taken back to an earlier one, makes room.
    """
    write_manifest(folder)
    place = run_dir / folder.name
    if place.exists():
        _put_away(place)
    folder.rename(place)
    return place


def rotate(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Put away the oldest checkpoints over `save_total_limit`, none of `keep` (newest and best).

    No limit, or one below 1: all stay.
    """
    if limit is None or limit < 1:
        return
    others = [folder for folder in _newest_first(run_dir) if folder not in keep]
    for folder in others[max(0, limit - len(keep)) :]:
        _put_away(folder)


def _put_away(folder: Path) -> None:
    away = folder.parent / PARTIAL / f"old-{folder.name}"
    away.parent.mkdir(exist_ok=True)
    folder.rename(away)


def remove_partial(run_dir: Path) -> None:
    """Delete what was put away, and what a crash left half written."""
    shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)


def _newest_first(run_dir: Path) -> list[Path]:
    numbered = {}
    for folder in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal():
            numbered[folder] = int(step)
    return sorted(numbered, key=numbered.__getitem__, reverse=True)

"""Checkpoint folders that are complete or absent, with a manifest that reveals later damage.

A checkpoint is written under `.latro-partial/` in the run's folder and renamed to `checkpoint-N`
when it is complete, the manifest last; a checkpoint to be deleted is renamed first. So no crash
leaves half a `checkpoint-N`. Damage by a disk or a copy afterwards is found with the manifest,
`checkpoint_manifest.json`:

    {"files": {"model.safetensors": {"bytes": 3639592, "crc32": "1c291ca3"}, ...}}

A CRC-32 finds every short burst of wrong bits, and misses other damage in one of 2³² cases. It is
as fast as a disk, but does not protect against intent.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from torch import distributed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from latro.files import write_json

MANIFEST = "checkpoint_manifest.json"
STATE = "trainer_state.json"
PARTIAL = ".latro-partial"
AUTO = "auto"
"""`--resume_from_checkpoint auto`: from the newest checkpoint, where there is one."""
SUPERSEDED = "_superseded-"
"""Put before the name of a checkpoint that a run went back from; "_" keeps it from the hub."""

# The errors that reading JSON of an unexpected shape raises; RecursionError: nested too deeply.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)

_logger = logging.getLogger(__name__)


def last_whole_checkpoint(output_dir: str) -> str:
    """Return the newest undamaged checkpoint folder, and warn of each newer one that is damaged.

    Processes of one run take the newest that all of them have, as they may have disks of their own.

    Raises:
        ValueError: there is none, or it cannot be resumed from.
    """
    newest: int | None = None
    while True:
        found = _last_whole(Path(output_dir), newest)
        steps = of_all_processes(None if found is None else found[1])
        if found is None or None in steps:
            without = [str(process) for process, step in enumerate(steps) if step is None]
            some = "" if len(without) == len(steps) else f" of process {', '.join(without)}"
            raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {output_dir}{some}")
        folder, step = found
        newest = min(steps)
        if newest == max(steps):
            check_optimizer_state(str(folder))
            return str(folder)
        if step > newest:
            _logger.warning("%s is left out: not all processes have a whole one", folder)


def _last_whole(run_dir: Path, newest: int | None) -> tuple[Path, int] | None:
    """Return the last whole checkpoint up to update `newest`, with its update."""
    for folder, step in _numbered(run_dir):
        if newest is not None and step > newest:
            continue
        fault = damage(folder)
        if fault is None:
            return folder, step
        _logger.warning("%s is damaged and left out: %s", folder, fault)
    return None


def of_all_processes(value: Any) -> list[Any]:
    """Return the values that the processes of this run call this with, in their order."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def beside(resumed_from: Path, checkpoint: Path, run_dir: Path) -> Path | None:
    """Return the place now of a checkpoint that another one's state names; None: there is none.

    The path in the state is that of the run before, whose folder may have been moved since, or may
    be named otherwise now: in a run that goes on in it, the name is that of `run_dir`.
    """
    folder = resumed_from.parent
    if run_dir.resolve() == folder.resolve():
        folder = run_dir
    return next((p for p in (folder / checkpoint.name, checkpoint) if is_there(p)), None)


def is_there(checkpoint: Path) -> bool:
    """Return whether a checkpoint is there, and not only what a process without weights saved."""
    return (checkpoint / STATE).is_file()


def check_checkpoint(folder: str) -> None:
    """Refuse a checkpoint folder that cannot be resumed from as it was saved.

    Raises:
        ValueError: it is not a checkpoint, is damaged (the message names the file), or has only
            weights.
    """
    if not os.path.isfile(os.path.join(folder, STATE)):
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint folder, got {folder!r}, which has no "
            f"{STATE}"
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

    The Trainer would silently start both anew.

    Raises:
        ValueError: there is no such state in the form of the Trainer, FSDP or DeepSpeed.
    """
    place = Path(folder)
    # FSDP writes `optimizer.bin` or a folder `optimizer_0`; DeepSpeed writes `global_step<N>`.
    whole = any(place.glob("optimizer*")) and os.path.isfile(place / "scheduler.pt")
    if not whole and not any(place.glob("global_step*")):
        raise ValueError(
            f"resume_from_checkpoint: {folder} lacks the state of optimiser or schedule, as with "
            "save_only_model; a run cannot go on from it. To train its weights further in a run of "
            "its own, name it as the model"
        )


def damage(folder: Path) -> str | None:
    """Describe the first file of a checkpoint that is not as it was written; None: all are intact.

    A checkpoint without a manifest, as other Trainers write them, passes if `trainer_state.json`,
    its last file, can be read and its safetensors files have the size that their headers imply.
    """
    try:
        has_manifest = MANIFEST in os.listdir(folder)
        return _damage_by_manifest(folder) if has_manifest else _damage_by_headers(folder)
    except OSError as error:
        return f"cannot be read ({error})"


def _damage_by_manifest(folder: Path) -> str | None:
    fault = _no_file(folder / MANIFEST)
    if fault is not None:
        return f"{MANIFEST}: {fault}"
    try:
        files = _listed(json.loads((folder / MANIFEST).read_bytes()))
    except _MALFORMED as error:
        return f"{MANIFEST}: cannot be read ({error!r})"
    if STATE not in files:
        # Every checkpoint has this file, so the manifest belongs to something else.
        return f"{MANIFEST}: does not list {STATE}"
    # Sizes first: a missing or short file is found without reading the large ones.
    for name, (size, _) in files.items():
        path = folder / name
        fault = _no_file(path)
        if fault is not None:
            return f"{name}: {fault}"
        if path.stat().st_size != size:
            return f"{name}: {path.stat().st_size:,} bytes, expected {size:,}"
    for name, (_, checksum) in files.items():
        found = _crc32(folder / name)
        if found != checksum:
            return f"{name}: its CRC-32 is {found}, expected {checksum}"
    return None


def _no_file(path: Path) -> str | None:
    """Tell why a path is not a regular file; None: it is one. Reading a pipe would block."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return str(error.strerror)
    except ValueError as error:
        # No file can have such a name, for example one with a null byte.
        return str(error)
    return None if stat.S_ISREG(mode) else "not a file"


def _listed(manifest: Any) -> dict[str, tuple[int, str]]:
    """Return the size and checksum of each file by its name.

    Raises:
        ValueError, KeyError, TypeError or AttributeError: it is not a manifest of a folder's files.
    """
    files = {}
    for name, entry in manifest["files"].items():
        size, checksum = entry["bytes"], entry["crc32"]
        if type(size) is not int or type(checksum) is not str:
            raise TypeError(f"{name}: expected bytes and crc32, got {size!r} and {checksum!r}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name}: expected a file inside of the folder")
        files[name] = (size, checksum)
    return files


def _damage_by_headers(folder: Path) -> str | None:
    fault = _no_file(folder / STATE)
    if fault is not None:
        return f"{STATE}: {fault}"
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{STATE}: not JSON ({error})"
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        return f"{STATE}: has no global_step"
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder)
        fault = _no_file(path)
        if fault is not None:
            return f"{name}: {fault}"
        try:
            expected = _safetensors_bytes(path)
        except _MALFORMED as error:
            return f"{name}: its header cannot be read ({error!r})"
        if path.stat().st_size != expected:
            return f"{name}: {path.stat().st_size:,} bytes, expected {expected:,}"
    return None


def _safetensors_bytes(path: Path) -> int:
    """Return the file size that the header implies: 8 bytes of length, the JSON, the tensors."""
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
    """Write the manifest: size and checksum of every file of a checkpoint."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def publish(folder: Path, run_dir: Path) -> Path:
    """Write a complete checkpoint's manifest, move it to its place in `run_dir` and return that.

    It replaces a checkpoint of the same step, from before the run went back to an earlier one.
    """
    write_manifest(folder)
    place = run_dir / folder.name
    # A dangling link is in the way of a folder, too.
    if os.path.lexists(place):
        _put_away(place)
    folder.rename(place)
    return place


def publish_files(folder: Path, place: Path) -> None:
    """Move the contents of `folder` to `place`, and replace what has the same names there."""
    for path in sorted(folder.iterdir()):
        target = place / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        path.replace(target)


def rotate(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Put away the oldest checkpoints beyond `limit`, except those in `keep` (newest and best).

    Without a limit, or with one below 1, all stay.
    """
    if limit is None or limit < 1:
        return
    others = [
        folder for folder in _newest_first(run_dir) if folder not in keep and os.path.isdir(folder)
    ]
    for folder in others[max(0, limit - len(keep)) :]:
        _put_away(folder)


def later_than(run_dir: Path, step: int) -> list[Path]:
    """Return the checkpoints of later updates, the last one first."""
    later = (folder for folder, number in _numbered(run_dir) if number > step)
    return [folder for folder in later if os.path.isdir(folder)]


def set_aside_later(run_dir: Path, step: int) -> None:
    """Rename the checkpoints of later updates, from before the run went back to an earlier one.

    The last of them would count as the newest, and the run go on from there. They are the user's to
    delete; those of an earlier time that the run went back make room for them.
    """
    for folder in later_than(run_dir, step):
        aside = folder.with_name(f"{SUPERSEDED}{folder.name}")
        if os.path.lexists(aside):
            _put_away(aside)
        folder.rename(aside)


def _put_away(folder: Path) -> None:
    away = folder.parent / PARTIAL / f"old-{folder.name}"
    away.parent.mkdir(exist_ok=True)
    folder.rename(away)


def remove_partial(run_dir: Path) -> None:
    """Delete what was put away and what a crash left unfinished."""
    shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)


def _newest_first(run_dir: Path) -> list[Path]:
    return [folder for folder, _ in _numbered(run_dir)]


def _numbered(run_dir: Path) -> list[tuple[Path, int]]:
    """Return the checkpoints and their updates, the last one first."""
    numbered = {}
    for folder in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isascii() and step.isdigit():
            numbered[folder] = int(step)
    return sorted(numbered.items(), key=lambda item: item[1], reverse=True)

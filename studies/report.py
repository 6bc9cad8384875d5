"""What the reports of studies have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from latro.files import replacing
from studies.records import Record, Study

REPORT_FILE = "README.md"
DISCUSSION_FILE = "discussion.md"


def write_sections(sections: Sequence[str], folder: Path) -> None:
    """Write the report's sections into `folder`."""
    with replacing(folder / REPORT_FILE) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def effort(study: Study, place: str, how: str = "") -> str:
    """Return how many cells took how long, and where and when they ran.

    Args:
        study: the finished cells.
        place: names a record's machine and versions, with fields of its environment in braces.
        how: stands behind the minutes.
    """
    places = {place.format_map(record["environment"]) for record in study.records}
    dates = sorted(record["environment"]["date"][:10] for record in study.records)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    seconds = sum(sum(record["seconds"]) for record in study.records)
    return (
        f"{len(study.records)} cells took {seconds / 60:.0f} minutes{how} on "
        f"{'; '.join(sorted(places))}; {when}."
    )


def discussion(folder: Path) -> list[str]:
    """Return the section that a person wrote beside the report; none where there is none."""
    file = folder / DISCUSSION_FILE
    if not file.exists():
        return []
    return [f"## Discussion\n\n{file.read_text(encoding='utf-8').strip()}"]


def commands_section(cells: Iterable[tuple[str, Record]]) -> str:
    """Return the commands of some cells, each after its title."""
    parts = [
        "## How a cell is made",
        "By these commands, in the study's folder; those of all are in [cells.json](cells.json).",
    ]
    for title, record in cells:
        lines = "\n".join(f"    {command}" for command in record["commands"])
        parts.append(f"{title}:\n\n{lines}")
    return "\n\n".join(parts)

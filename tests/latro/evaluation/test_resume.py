from __future__ import annotations

import json
import zlib

import pytest
import torch

from latro.evaluation.resume import Journal, crc32_of_each, weights_crc32

PROMPTS = [[1], [2], [3], [4], [5]]
IDENTITY = {"settings": {"seed": 1, "majority": (1, 2)}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "evaluation.jsonl"


@pytest.fixture
def lines(path):
    """Write the lines of five problems, with a text that needs escaping."""
    made = [{"index": i, "text": "a\u2028b\r\n€", "logp": -1 / 3 * i} for i in range(5)]
    journal = Journal(path, IDENTITY)
    assert journal.open(PROMPTS, 2) == []
    for start in (0, 2, 4):
        journal.append(made[start : start + 2])
    return made


def test_lines_come_back_as_they_were(path, lines):
    before = path.read_bytes()
    assert Journal(path, IDENTITY).open(PROMPTS, 2) == lines
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("size", "batch_size", "kept"),
    [(0.99, 2, 4), (0.7, 2, 2), (0.7, 1, 3), (0.1, 2, 0), (0.99, 3, 3), (1, 3, 5)],
)
def test_a_torn_line_and_a_begun_batch_are_dropped(path, lines, size, batch_size, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(size * len(whole))])
    journal = Journal(path, IDENTITY)
    assert journal.open(PROMPTS, batch_size) == lines[:kept]
    journal.append(lines[kept:])
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name(path, lines):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"of another evaluation: settings.seed 1 there, 2 here; "):
        Journal(path, {"settings": {"seed": 2, "majority": [1, 2]}}).open(PROMPTS, 2)
    with pytest.raises(ValueError, match=r"prompts\.crc32"):
        Journal(path, IDENTITY).open([[1], [2], [3], [4], [6]], 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("settings", [b"", b"{", b"[]", b'{"model": 1}', b"\xff", b"[" * 100_000])
def test_damaged_settings_are_named(path, lines, settings):
    place = path.with_suffix(".settings.json")
    place.write_bytes(settings)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"output: {place}: "):
        Journal(path, IDENTITY).open(PROMPTS, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_no_evaluation_wrote_is_left_alone(path, lines, overwrite):
    """The file may be the user's data."""
    (path.parent / "evaluation.settings.json").unlink()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"without evaluation.settings.json"):
        Journal(path, IDENTITY, overwrite).open(PROMPTS, 2)
    assert path.read_bytes() == before


def test_overwriting_starts_anew(path, lines):
    assert Journal(path, {"settings": {"seed": 2}}, overwrite=True).open(PROMPTS, 2) == []
    assert path.read_bytes() == b""
    assert json.loads((path.parent / "evaluation.settings.json").read_text())["settings"] == {
        "seed": 2
    }


@pytest.mark.parametrize("damage", [b'{"index": 0', b'{"index": 3}', b"[0]"])
def test_a_line_damaged_before_the_last_is_named(path, lines, damage):
    _, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(damage + b"\n" + rest)
    with pytest.raises(ValueError, match=r"evaluation.jsonl:1: "):
        Journal(path, IDENTITY).open(PROMPTS, 2)


def test_checksums_see_a_changed_value(tiny):
    model = tiny()
    before = weights_crc32(model)
    assert before == weights_crc32(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_crc32(model) != before
    assert weights_crc32(tiny().bfloat16()) != before


@pytest.mark.parametrize("values", [[], [[1, 2]], [{"a": "é"}, {"a": 2}, None], PROMPTS])
def test_a_list_has_the_checksum_of_its_json(values):
    whole = f"{zlib.crc32(json.dumps(values).encode()):08x}"
    assert crc32_of_each(iter(values)) == (whole, len(values))

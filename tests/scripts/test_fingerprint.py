from __future__ import annotations

import torch

from scripts import fingerprint


def test_the_ops_have_the_same_bits_twice():
    assert list(fingerprint.ops()) == list(fingerprint.ops())


def test_a_bit_a_shape_and_a_dtype_count():
    row = torch.tensor([1.0, 2.0])
    others = [torch.nextafter(row, row + 1), row[None], row.double(), None]
    assert len({fingerprint.checksum([t]) for t in [row, *others]}) == 5


def test_metrics_count_without_their_times(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sums = []
    for reward, seconds in ((-1.0, 2.0), (-1.0, 3.0), (-1.5, 3.0)):
        path.write_text(f'{{"reward": {reward}, "time_step": {seconds}}}\n')
        sums.append(fingerprint._metrics(str(path)))
    assert sums[0] == sums[1] != sums[2]

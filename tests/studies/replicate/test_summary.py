"""Means, deviations and differences of records."""

from __future__ import annotations

import json

import pytest

from studies.estimates import Estimate
from studies.records import estimate
from studies.replicate.summary import Study


def test_a_study_is_read_as_it_was_written(record, tmp_path):
    study = Study("python -m studies.replicate", 2, (record("main-llama-arithmetic-latro-1"),))
    (tmp_path / "cells.json").write_text(json.dumps(study.as_json()))
    assert Study.read(tmp_path) == study


def test_a_folder_without_a_study_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"output_dir: expected a study's cells\.json"):
        Study.read(tmp_path)


def test_cells_of_two_studies_do_not_mix(record):
    one, other = record("main-llama-arithmetic-latro-1"), record("main-llama-arithmetic-latro-2")
    Study("", 1, (one, other))
    other["settings"]["max_steps"] += 1
    with pytest.raises(ValueError, match=r"settings of main-llama-arithmetic-latro-2 unlike"):
        Study("", 1, (one, other))


def test_an_ablation_has_the_main_cells_for_the_main_value(record):
    names = ["ablation-beta=0.0-1", "ablation-beta=0.0-2", "ablation-kl=k3-1"]
    main = [f"main-llama-arithmetic-latro-{seed}" for seed in (1, 2, 3)]
    unlike = ["main-llama-arithmetic-base-1", "main-mistral-arithmetic-latro-1"]
    study = Study("", 1, tuple(record(name) for name in (*names, *main, *unlike)))
    of = study.ablation("beta")
    assert {value: [r["name"] for r in records] for value, records in of.items()} == {
        0.0: names[:2],
        0.05: main,
    }
    assert study.ablation("num_generations") == {}


def test_an_estimate_leaves_out_what_has_no_such_metric(record):
    records = [record("main-llama-arithmetic-latro-1"), record("main-llama-arithmetic-base-1")]
    assert estimate(records, "kl", "training") == Estimate(2.0, None, 1)
    assert estimate(records[1:], "kl", "training") is None

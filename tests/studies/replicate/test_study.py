"""The cells of a study."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from latro.config.training import ASSETS
from studies.cells import Cell, select
from studies.replicate.study import (
    ABLATIONS,
    ARCHITECTURES,
    LATRO,
    METHODS,
    SFT_LEARNING_RATE,
    SFT_LEARNING_RATES,
    TASKS,
    Scale,
    cells,
)


def test_every_combination_is_there_once():
    everything = cells(Scale())
    main = Counter(
        (c.architecture, c.task, c.method, c.seed) for c in everything if c.part == "main"
    )
    expected = {
        (a, t, m, s) for a in ARCHITECTURES for t in TASKS for m in METHODS for s in (1, 2, 3)
    }
    assert main.keys() == expected
    assert set(main.values()) == {1}
    varied = Counter(
        (*next(iter(c.changed.items())), c.seed) for c in everything if c.part == "ablation"
    )
    assert set(varied.values()) == {1}
    for setting, values in ABLATIONS.items():
        there = {value for name, value, seed in varied if name == setting and seed == 2}
        assert there == set(values) - {LATRO[setting]}


def test_no_commands_are_run_twice():
    everything = cells(Scale())
    # Ignore the names of output folders, which differ in any case.
    chains = Counter(tuple(command.replace(c.name, "") for command in c.chain) for c in everything)
    assert set(chains.values()) == {1}
    assert len({c.name for c in everything}) == len(everything)


def test_the_main_setting_is_among_those_varied():
    for setting, values in ABLATIONS.items():
        assert LATRO[setting] in values, setting
    assert set(SFT_LEARNING_RATE.values()) <= set(SFT_LEARNING_RATES)


def test_a_base_model_comes_before_what_starts_from_it():
    seen: set[str] = set()
    for cell in cells(Scale()):
        assert cell.base is None or cell.base.name in seen
        seen.add(cell.name)


def test_only_the_model_that_ships_is_not_pretrained():
    everything = cells(Scale(pretrain_steps=7))
    of = {(c.architecture, c.task): c for c in everything if c.part == "base model"}
    assert of.keys() == {(a, t) for a in ARCHITECTURES for t in TASKS} - {("llama", "arithmetic")}
    phi = of["phi3", "arithmetic_choice"]
    assert phi.chain == [
        "python -m studies.replicate.pretrain --architecture phi3 --task arithmetic "
        "--output_dir base/phi3-arithmetic --steps 7",
        "python -m studies.replicate.pretrain --architecture phi3 --task arithmetic_choice "
        "--output_dir base/phi3-arithmetic_choice --start_from base/phi3-arithmetic --steps 7",
    ]
    for cell in everything:
        if (cell.architecture, cell.task) == ("phi3", "arithmetic_choice") and cell != phi:
            assert cell.chain[:2] == phi.chain
            assert "--model_name_or_path base/phi3-arithmetic_choice" in cell.chain[2]


def test_the_trained_model_is_the_one_that_is_evaluated():
    for cell in cells(Scale()):
        if cell.part != "base model" and cell.method != "base":
            train, evaluate = cell.commands
            model = train[train.index("--output_dir") + 1]
            assert evaluate[evaluate.index("--model_name_or_path") + 1] == model


def test_settings_made_for_the_model_that_ships_do_not_seep_in():
    """Without --model_name_or_path, default.yaml would supply what a command leaves out."""
    made_for_it = yaml.safe_load((ASSETS / "default.yaml").read_text())
    without_effect = {"logging_steps", "eval_steps", "per_device_eval_batch_size"}
    cell = _cell("main-llama-arithmetic-latro-1")
    assert {f"--{name}" for name in made_for_it.keys() - without_effect} <= set(cell.commands[0])


def test_an_ablation_differs_in_one_setting_from_the_main_cell():
    main = _cell("main-llama-arithmetic-latro-2")
    for cell in cells(Scale()):
        if cell.part == "ablation" and cell.seed == 2:
            different = {k for k in LATRO if cell.settings[k] != main.settings[k]}
            assert different == set(cell.changed)


def test_the_length_limit_holds_in_evaluation_too():
    train, evaluate = _cell("ablation-max_completion_length=16-1").commands
    for command in (train, evaluate):
        assert command[command.index("--max_completion_length") + 1] == "16"


def test_learning_rates_are_chosen_on_validation_alone():
    for cell in cells(Scale()):
        if cell.part != "base model":
            evaluate = cell.commands[-1]
            split = evaluate[evaluate.index("--eval_split") + 1]
            assert split == ("validation" if cell.part == "tuning" else "test")


def test_select_takes_base_models_along():
    chosen = select(cells(Scale()), ["main-phi3-arithmetic-latro-*", "ablation-kl=k3-1"])
    assert [c.name for c in chosen] == [
        "base-phi3-arithmetic",
        "main-phi3-arithmetic-latro-1",
        "main-phi3-arithmetic-latro-2",
        "main-phi3-arithmetic-latro-3",
        "ablation-kl=k3-1",
    ]


def test_a_pattern_without_a_cell_is_an_error():
    with pytest.raises(ValueError, match=r"only: .* got 'mian-\*'"):
        select(cells(Scale()), ["main-*", "mian-*"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"ablation_seeds": 4}, "ablation_seeds: expected 0 to 3"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
        ({"pretrain_steps": 0}, "pretrain_steps"),
    ],
)
def test_a_scale_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Scale(**settings)


def _cell(name: str) -> Cell:
    (cell,) = (cell for cell in cells(Scale()) if cell.name == name)
    return cell

"""The cells of the study."""

from __future__ import annotations

from collections import Counter

import pytest

from studies.real_model.study import (
    BASE_FOLDER,
    LATRO,
    LIMITS,
    METHODS,
    SFT_LEARNING_RATES,
    SYSTEM_PROMPT,
    TOGETHER,
    TRIAL_TASKS,
    TRIALS,
    WORKED,
    Scale,
    cells,
)


def test_main_cells_are_all_methods_that_a_task_has_the_data_for():
    main = Counter((c.task, c.method, c.seed) for c in cells(Scale((1, 2))) if c.part == "main")
    expected = {
        (task, method, seed)
        for task in LIMITS
        for method in METHODS
        for seed in (1, 2)
        if task != "arc_challenge" or method not in WORKED
    }
    assert main == Counter(expected)


def test_no_two_cells_run_the_same_commands_and_all_start_from_the_model():
    everything = cells(Scale((1, 2)))
    # The evaluation and the folders have the cell's own name; without it they must still differ.
    chains = Counter(
        " ".join(command.replace(cell.name, "NAME") for command in cell.chain)
        for cell in everything
    )
    assert set(chains.values()) == {1}
    assert all(c.base is everything[0] for c in everything[1:])
    assert everything[0].result == BASE_FOLDER


def test_main_cells_are_judged_on_test_and_trials_on_other_problems(named):
    for cell in named.values():
        commands = {command[0]: command for command in cell.commands}
        if cell.part == "base model":
            continue
        split = "test" if cell.part == "main" else "validation"
        for module in ("latro.probe", "latro.evaluate"):
            command = commands[module]
            assert command[command.index("--eval_split") + 1] == split


def test_trials_have_every_value_once():
    trials = [cell for cell in cells(Scale()) if cell.part == "trial"]
    tried = Counter((c.task, c.method, *c.changed.items()) for c in trials)
    latro = {
        (task, "latro", (setting, value))
        for task in TRIAL_TASKS
        for setting, values in TRIALS.items()
        for value in values
        if value != LATRO[setting] or setting == "learning_rate"
    }
    together = {(task, "latro", *changed.items()) for task in TRIAL_TASKS for changed in TOGETHER}
    sft = {
        (task, method, ("learning_rate", rate))
        for task in TRIAL_TASKS
        for method in ("sft-answer", "sft-rationale")
        if (task, method) != ("arc_challenge", "sft-rationale")
        for rate in SFT_LEARNING_RATES
    }
    assert tried == Counter(latro | together | sft)
    assert all(LATRO[setting] in values for setting, values in TRIALS.items())


def test_latro_after_sft_starts_from_what_sft_left(named):
    cell = named["main-gsm8k-sft-latro-1"]
    (sft, latro, *_) = cell.commands
    assert (sft[0], latro[0]) == ("latro.sft", "latro.train")
    warm = sft[sft.index("--output_dir") + 1]
    assert latro[latro.index("--model_name_or_path") + 1] == warm
    assert sft[sft.index("--model_name_or_path") + 1] == BASE_FOLDER
    assert cell.settings.items() >= LATRO.items()


def test_shown_commands_can_be_pasted_into_a_shell(named):
    shown = named["main-arithmetic-base-1"].chain[-1]
    assert f"--system_prompt '{SYSTEM_PROMPT}'" in shown
    assert "SYSTEM" not in named["main-gsm8k-base-1"].chain[-1]
    assert "--dataset_path data/gsm8k" in named["main-gsm8k-base-1"].chain[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "seeds: expected different ones"),
        ({"seeds": (1, 1)}, "seeds: expected different ones"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
        ({"num_eval_examples": 0}, "num_eval_examples: expected at least 1, got 0"),
    ],
)
def test_a_bad_scale(settings, message):
    with pytest.raises(ValueError, match=message):
        Scale(**settings)

from __future__ import annotations

import pytest

from latro import LatroConfig
from latro.arguments import parse_arguments
from latro.config import DataArguments, ModelArguments

CLASSES = (ModelArguments, DataArguments, LatroConfig)


def parse(*argv: str):
    return parse_arguments(CLASSES, argv, prog="latro")


def test_defaults_are_the_papers():
    _, _, args = parse("--model_name_or_path", "some/model")
    assert (args.num_generations, args.max_completion_length) == (16, 500)
    assert (args.learning_rate, args.beta, args.temperature) == (5e-7, 0.05, 1.0)
    assert (args.answer_weight, args.kl, args.unfinished) == (1.0, "reward", "floor")
    assert args.objective == "latro"
    assert args.lr_scheduler_type == "linear"
    assert args.warmup_steps == 0


def test_published_names_are_aliases():
    _, _, args = parse(
        *("--model_name_or_path", "m", "--rloo_k", "4", "--kl_coef", "0.25"),
        *("--response_length", "77"),
    )
    assert (args.num_generations, args.beta, args.max_completion_length) == (4, 0.25, 77)


def test_without_a_model_the_small_ones_settings_stand_in():
    model, data, args = parse()
    assert model.model_name_or_path is None
    assert data.dataset_name == "arithmetic"
    assert args.learning_rate > 5e-7
    assert parse("--learning_rate", "0.5")[2].learning_rate == 0.5


def test_several_trackers_are_named_one_after_another(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert parse("--report_to", "tensorboard", "wandb")[2].report_to == ["tensorboard", "wandb"]
    assert parse("--report_to", "none")[2].report_to == []


def test_command_line_over_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nnum_generations: 8\nbeta: 0.25\nlearning_rate: 1e-6\n")
    _, _, args = parse("--config", str(path), "--beta", "0.5")
    assert (args.num_generations, args.beta, args.learning_rate) == (8, 0.5, 1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generation: 8", "unknown argument 'num_generation'; did you mean num_generations?"),
        ("- a\n- b", "expected lines of `name: value`"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse("--config", str(path))


def test_missing_yaml(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_unknown_argument():
    with pytest.raises(ValueError, match="--num_generatoins"):
        parse("--model_name_or_path", "m", "--num_generatoins", "4")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_generations": 1}, "num_generations: expected at least 2 .leave-one-out.*got 1"),
        ({"max_completion_length": 0}, "max_completion_length: expected at least 1, got 0"),
        ({"token_budget": 0}, "token_budget"),
        ({"beta": -0.1}, "beta: expected at least 0, got -0.1"),
        ({"beta": float("nan")}, "beta"),
        ({"answer_weight": -1.0}, "answer_weight"),
        ({"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        ({"objective": "grpo"}, "objective: expected one of latro, verifree, jepo, rlpr, sft, got"),
        ({"rlpr_min_std": -0.1}, "rlpr_min_std: expected at least 0, got -0.1"),
        ({"kl": "k2"}, "kl: expected one of reward, k3, exact, got 'k2'"),
        ({"unfinished": "drop"}, "unfinished: expected one of floor, exclude"),
        ({"backend": "tpu"}, "backend: expected one of auto"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        LatroConfig(output_dir=str(tmp_path / "run"), **setting)
    assert not (tmp_path / "run").exists()


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}


@pytest.mark.parametrize("name", [None, "accuracy_greedy", "eval_accuracy_sampled", "answer_logp"])
def test_a_better_model_has_more_of_the_metric(tmp_path, name):
    args = LatroConfig(
        output_dir=str(tmp_path), **BEST, save_steps=2, eval_steps=2, metric_for_best_model=name
    )
    assert args.metric_for_best_model == (name or "eval_accuracy_greedy")
    assert args.greater_is_better is True


def test_without_a_best_model_there_is_no_metric_for_it(tmp_path):
    args = LatroConfig(output_dir=str(tmp_path), eval_split="test")
    assert args.metric_for_best_model is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_split": "test"}, r"held out of training \(--eval_split validation\)"),
        ({"metric_for_best_model": "loss"}, "expected one of eval_accuracy_greedy, .*got 'loss'"),
        ({"save_steps": 4}, "got save_steps 4 and eval_steps 2"),
        ({"save_strategy": "best", "eval_split": "test"}, "held out of training"),
    ],
)
def test_a_best_model_that_cannot_be_chosen(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LatroConfig(
            output_dir=str(tmp_path), **{**BEST, "save_steps": 2, "eval_steps": 2, **settings}
        )


def test_help_has_groups_with_ours_first(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    titles = ["\nmodel:", "\ndata:", "\nLaTRO:", "\ntransformers.TrainingArguments:"]
    places = [text.index(title) for title in titles]
    assert text.startswith("usage: latro [--config FILE]")
    assert places == sorted(places)
    assert places[2] < text.index("K, rationales sampled") < places[3]
    assert places[3] < text.index("--adam_beta1 ADAM_BETA1")

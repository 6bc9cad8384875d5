from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from accelerate import ParallelismConfig
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from latro import LatroConfig
from latro.config.command_line import parse_arguments
from latro.config.data import DataArguments
from latro.config.model import ModelArguments, PeftArguments
from latro.config.training import SftConfig
from latro.config.unsupported import _REFUSED
from latro.evaluate import EvaluateArguments
from latro.evaluation import EvaluationSettings
from latro.probe import ProbeArguments

CLASSES = (ModelArguments, DataArguments, LatroConfig)


def parse(*argv: str):
    return parse_arguments(CLASSES, argv, prog="latro")


def test_defaults_are_the_papers():
    _, _, args = parse("--model_name_or_path", "some/model")
    assert (args.num_generations, args.max_completion_length) == (16, 500)
    assert (args.learning_rate, args.beta, args.temperature) == (5e-7, 0.05, 1.0)
    assert (args.answer_weight, args.kl, args.unfinished) == (1.0, "reward", "floor")
    assert args.objective == "latro"
    assert args.reward_tokens == "all"
    assert args.answer_weight_warmup_steps == 0
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


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "output_dir: ~/run\nresume_from_checkpoint: ~/run/checkpoint-2\n"
        "model_name_or_path: ~/model\nsystem_prompt: ~/\n"
    )
    model, data, args = parse("--config=~/run.yaml", "--dataset_path=~/data")
    assert args.output_dir == f"{tmp_path}/run"
    assert args.resume_from_checkpoint == f"{tmp_path}/run/checkpoint-2"
    assert (model.model_name_or_path, data.dataset_path) == (
        f"{tmp_path}/model",
        f"{tmp_path}/data",
    )
    assert data.system_prompt == "~/"
    for kind in (EvaluateArguments, ProbeArguments):
        (args,) = parse_arguments((kind,), ["--output=~/a.json"], prog="latro")
        assert args.output == f"{tmp_path}/a.json"


def test_several_trackers_are_named_one_after_another(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert parse("--report_to", "tensorboard", "wandb")[2].report_to == ["tensorboard", "wandb"]
    assert parse("--report_to", "none")[2].report_to == []


def test_command_line_over_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nnum_generations: 8\nbeta: 0.25\nlearning_rate: 1e-6\n")
    _, _, args = parse("--config", str(path), "--beta", "0.5")
    assert (args.num_generations, args.beta, args.learning_rate) == (8, 0.5, 1e-6)


@pytest.mark.parametrize("name", ["use_bnb_nested_quant", "bnb_4bit_use_double_quant"])
def test_one_quantisation_takes_the_place_of_another(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\nload_in_4bit: true\n{name}: true\n")
    model, _, _ = parse("--config", str(path))
    assert (model.load_in_4bit, model.use_bnb_nested_quant) == (True, True)
    model, _, _ = parse("--config", str(path), "--load_in_8bit", "true")
    assert (model.load_in_4bit, model.load_in_8bit) == (False, True)
    assert not model.use_bnb_nested_quant


def parse_yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse("--config", str(path))


def test_yaml_is_read_as_the_command_line_is(tmp_path):
    model, _, args = parse_yaml(
        tmp_path,
        "model-name-or-path: m\nrloo_k: 4\nresponse_length: 7\nsave_strategy: no\n"
        "eval_strategy: no\nresume_from_checkpoint: true\nuse_cpu: yes\nnum_eval_examples: null\n"
        "model_revision: 1.0\nlr_scheduler_kwargs: {min_lr: 1e-7, deep: {on: yes}}\n"
        "report_to: []\noptim_target_modules: [no, 1]\n",
    )
    assert (model.model_name_or_path, model.model_revision) == ("m", "1.0")
    assert (args.num_generations, args.max_completion_length) == (4, 7)
    assert (args.save_strategy, args.eval_strategy) == ("no", "no")
    assert (args.resume_from_checkpoint, args.use_cpu) == ("true", True)
    assert args.num_eval_examples is None
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7, "deep": {True: True}}
    assert (args.report_to, args.optim_target_modules) == ([], ["no", "1"])


def test_an_alias_in_yaml_wins_over_the_small_models_settings(tmp_path):
    assert parse()[2].num_generations == 8
    assert parse_yaml(tmp_path, "rloo_k: 5")[2].num_generations == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generation: 8", "unknown argument 'num_generation'; did you mean num_generations?"),
        ("save_strategy: never", "argument --save_strategy.*: invalid choice: 'never'"),
        ("dtype: half", "argument --dtype: invalid choice: 'half'"),
        ("grader: x", "argument --grader: invalid choice: 'x'"),
        ("learning_rate: fast", "argument --learning_rate.*: invalid float value: 'fast'"),
        ("learning_rate: null", "argument learning_rate does not take None"),
        ("beta: {a: 1}", "argument beta does not take {'a': 1}"),
        ("no_dataloader_in_order: true", "unknown argument 'no_dataloader_in_order'"),
        ("help: true", "unknown argument 'help'"),
        ("- a\n- b", "expected lines of `name: value`"),
        ("a: [", "is not YAML"),
        ("beta: 0.1\nlearning_rate: 1\nbeta: 0.7", "is not YAML: beta is given twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "is not YAML: a is given twice"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"run.yaml.*{message}".replace("?", r"\?")):
        parse("--config", str(path))


def test_a_merged_mapping_gives_way(tmp_path):
    text = "lr_scheduler_kwargs: {<<: &a {min_lr: 1, x: 2}, min_lr: 3}\n"
    assert parse_yaml(tmp_path, text)[2].lr_scheduler_kwargs == {"min_lr": 3, "x": 2}


def test_two_files_are_refused(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("beta: 0.1\n")
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    with pytest.raises(ValueError, match=r"--config: expected one file, got .*a.yaml, .*b.yaml"):
        parse(*files)


def test_missing_yaml(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_an_evaluation_at_the_start_is_asked_for_or_refused():
    assert parse()[2].eval_on_start is None
    assert parse("--eval_on_start")[2].eval_on_start is True
    assert parse("--eval_on_start", "false")[2].eval_on_start is False


def test_unknown_argument():
    with pytest.raises(ValueError, match="--num_generatoins"):
        parse("--model_name_or_path", "m", "--num_generatoins", "4")


def test_the_answers_weight_rises_linearly(tmp_path):
    args = LatroConfig(str(tmp_path), answer_weight=0.5, answer_weight_warmup_steps=4)
    assert [args.answer_weight_at(step) for step in range(6)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert LatroConfig(str(tmp_path), answer_weight=0.5).answer_weight_at(0) == 0.5


@pytest.mark.parametrize("name", ["temperature", "beta", "answer_weight", "rlpr_min_std"])
@pytest.mark.parametrize("value", [True, "1.0", None])
def test_a_number_is_no_text(name, value, tmp_path):
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got {type(value).__name__}$"):
        LatroConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_steps", 2.5, r"expected a whole number, got 2\.5"),
        ("answer_weight_warmup_steps", 0.1, r"expected a whole number, got 0\.1"),
        ("save_total_limit", "3", "expected a whole number, got '3'"),
        ("ddp_timeout", None, "expected a whole number, got None"),
        ("num_generations", True, "expected a whole number, got True"),
        ("logging_steps", "3", "expected a number, got str"),
        ("bf16", "false", "expected True or False, got 'false'"),
        ("log_completions", 1, "expected True or False, got 1"),
        ("train_sampling_strategy", "nonsense", "expected one of random, seq.*, got 'nonsense'"),
        ("ddp_backend", "nonsense", "expected one of nccl, gloo.*, got 'nonsense'"),
        ("ddp_backend", "gloo", "expected it left out with one process.*, got 'gloo'"),
        ("log_level", "nonsense", "expected one of .*warning.*, got 'nonsense'"),
        ("eval_strategy", "nonsense", "expected one of no, steps, epoch, got 'nonsense'"),
        ("optim", "nonsense", "expected one of .*adafactor.*, got 'nonsense'"),
        ("lr_scheduler_kwargs", "nonsense", "expected a JSON object, got 'nonsense'"),
        ("activation_checkpointing_kwargs", '{"a"', "expected a JSON object, got"),
    ],
)
def test_a_setting_of_another_kind_is_refused_by_name(tmp_path, name, value, message):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        LatroConfig(output_dir=str(tmp_path / "run"), **{name: value})


def test_settings_of_numpys_kinds_become_pythons(tmp_path):
    given = {"num_generations": np.int64(4), "seed": np.uint32(3), "save_steps": np.int64(5)}
    given |= {
        "beta": np.float32(0.5),
        "learning_rate": np.float64(1e-5),
        "eval_on_start": np.False_,
    }
    args = LatroConfig(output_dir=str(tmp_path), **given)
    written = json.loads(args.to_json_string())
    for name, value in given.items():
        assert written[name] == value
        assert type(getattr(args, name)) is type(value.item())
    for wrong in (np.float64(4), np.array([4])):
        with pytest.raises(TypeError, match=r"^num_generations: expected a whole number, got "):
            LatroConfig(output_dir=str(tmp_path), num_generations=wrong)
    settings = EvaluationSettings(num_samples=np.int64(2), temperature=np.float32(0.5))
    assert settings.num_samples == 2


def test_settings_of_models_data_and_evaluations_have_kinds_too():
    with pytest.raises(TypeError, match=r"^lora_r: expected a whole number, got '8'"):
        PeftArguments(use_peft=True, lora_r="8")
    with pytest.raises(ValueError, match=r"^dtype: expected one of auto, float32.*, got 'int8'"):
        ModelArguments(dtype="int8")
    with pytest.raises(ValueError, match=r"^grader: expected one of exact.*, got 'nonsense'"):
        DataArguments(grader="nonsense")
    with pytest.raises(TypeError, match=r"^num_samples: expected a whole number, got 2\.5"):
        EvaluateArguments(num_samples=2.5)
    with pytest.raises(TypeError, match=r"^overwrite: expected True or False, got 'no'"):
        ProbeArguments(overwrite="no")


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
        ({"temperature": float("nan")}, "temperature: expected more than 0, got nan"),
        ({"temperature": 1e-50}, "temperature: expected a number from 1.18e-38 to .*, got 1e-50"),
        ({"temperature": float("inf")}, "temperature: expected a number from .*, got inf"),
        ({"beta": float("inf")}, "beta: expected at most 3.4e.38, got inf"),
        ({"beta": 1e39}, "beta: expected at most 3.4e.38, got 1e.39"),
        ({"answer_weight": 1e39}, "answer_weight: expected at most"),
        (
            {"answer_weight_warmup_steps": -1},
            "answer_weight_warmup_steps: expected at least 0, got -1",
        ),
        (
            {"answer_weight_warmup_steps": 5, "objective": "rlpr"},
            "answer_weight_warmup_steps: expected 0 with objective='rlpr', which has no λ, got 5",
        ),
        ({"objective": "grpo"}, "objective: expected one of latro, verifree, jepo, rlpr, sft, got"),
        ({"rlpr_min_std": -0.1}, "rlpr_min_std: expected at least 0, got -0.1"),
        ({"kl": "k2"}, "kl: expected one of reward, k3, exact, got 'k2'"),
        ({"unfinished": "drop"}, "unfinished: expected one of floor, exclude"),
        (
            {"reward_tokens": "template"},
            r"reward_tokens: expected one of all, template\+answer, answer, got 'template'",
        ),
        (
            {"reward_tokens": "answer", "objective": "rlpr"},
            "reward_tokens: expected all with objective='rlpr', whose reward .* already; got 'ans",
        ),
        (
            {"reward_tokens": "template+answer", "objective": "verifree"},
            "reward_tokens: expected all with objective='verifree', .* all of y; got 'template.ans",
        ),
        (
            {"reward_tokens": "answer", "objective": "jepo"},
            "reward_tokens: expected all with objective='jepo', whose bound",
        ),
        (
            {"reward_tokens": "answer", "objective": "sft"},
            "reward_tokens: expected all with objective='sft', which has no reward",
        ),
        ({"backend": "tpu"}, "backend: expected one of auto"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_kwargs: expected none with lr_scheduler_type='constant', which reads no",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"torch_compile": True}, "torch_compile: expected it left out .packed rows have segments"),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: expected split_batches left out .*of each device.*, got True",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config: expected dispatch_batches left out .*rows are text.*, got True",
        ),
        (
            {"accelerator_config": {"use_seedable_sampler": False}},
            "accelerator_config: expected use_seedable_sampler left out .*resume.*, got False",
        ),
        ({"torch_compile_mode": "default"}, "torch_compile_mode: expected it left out"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: .* noise would be in scoring alone"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: .*got 0.1"),
        ({"torch_empty_cache_steps": 4}, "torch_empty_cache_steps"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
        ({"fp16_full_eval": True}, "fp16_full_eval"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"optim": "adalomo"}, "optim: .*inside of a backward"),
        ({"optim": OptimizerNames.LOMO}, "optim: .*inside of a backward"),
        ({"optim": "galore_adamw_layerwise"}, "optim: .*inside of a backward"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics"),
        ({"do_predict": True}, "do_predict: .* no batches of predictions"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches: .*got False"),
        ({"length_column_name": "tokens"}, "length_column_name"),
        ({"use_liger_kernel": True}, "use_liger_kernel: .*changes the model's layers.*got True"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config: .*changes the model's"),
        (
            {"enable_jit_checkpoint": True},
            "enable_jit_checkpoint: .*SIGTERM, SIGINT and SIGHUP are",
        ),
        ({"use_cache": True}, "use_cache: .*says itself whether it keeps a cache"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: .*got False"),
        (
            {"parallelism_config": ParallelismConfig(tp_size=2)},
            "parallelism_config: expected processes that share the data alone",
        ),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        LatroConfig(output_dir=str(tmp_path / "run"), **setting)
    assert not (tmp_path / "run").exists()


# Fields of TrainingArguments that our trainers use as transformers does, or check.
_TAKEN = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2
adam_epsilon auto_find_batch_size bf16 data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
do_train eval_delay eval_on_start eval_steps eval_strategy fp16 fsdp fsdp_config full_determinism
gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better
hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
learning_rate load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs
lr_scheduler_type max_grad_norm max_steps metric_for_best_model num_train_epochs optim_args
optim_target_modules output_dir parallelism_config per_device_eval_batch_size
per_device_train_batch_size project push_to_hub remove_unused_columns report_to
restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node
save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32
trackio_bucket_id trackio_space_id trackio_static_space_id use_cpu warmup_steps weight_decay
"""


def test_every_setting_of_transformers_is_taken_or_refused():
    """A setting of a new version fails here until somebody has looked at it."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    taken = set(_TAKEN.split())
    assert fields - taken - set(_REFUSED) == set()
    assert taken & set(_REFUSED) == set()


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}


@pytest.mark.parametrize("name", [None, "accuracy_greedy", "eval_accuracy_sampled", "answer_logp"])
def test_a_better_model_has_more_of_the_metric(tmp_path, name):
    args = LatroConfig(
        output_dir=str(tmp_path), **BEST, save_steps=2, eval_steps=2, metric_for_best_model=name
    )
    assert args.metric_for_best_model == (name or "eval_accuracy_greedy")
    assert args.greater_is_better is True


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_by_the_metric_is_told_that_more_is_better(tmp_path, name):
    settings = {"output_dir": str(tmp_path), "lr_scheduler_type": name, "eval_strategy": "steps"}
    args = LatroConfig(**settings)
    assert args.metric_for_best_model == "eval_accuracy_greedy"
    assert args.lr_scheduler_kwargs == {"mode": "max", "threshold_mode": "abs"}
    args = LatroConfig(**settings, lr_scheduler_kwargs='{"mode": "min", "patience": 3}')
    assert args.lr_scheduler_kwargs == {"mode": "min", "threshold_mode": "abs", "patience": 3}


def test_a_plateau_of_accuracy_lowers_the_learning_rate(make_trainer, monkeypatch):
    planted = iter([0.1, 0.2, 0.2, 0.2])
    monkeypatch.setattr(
        "latro.evaluating_trainer.evaluate_model",
        lambda *args, **options: ({"accuracy_greedy": next(planted)}, []),
    )
    trainer = make_trainer(
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.5,
        max_completion_length=2,
    )
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == [0.5, 0.5, 0.5, 0.25]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.125


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


CLASSES_OF_A_RUN = (ModelArguments, PeftArguments, DataArguments, LatroConfig)
FILE = """
model_name_or_path: m
model_revision: v2
gguf_file: m.gguf
dataset_name: org/data
dataset_config: main
dataset_path: data
grader: exact
metric_for_best_model: eval_accuracy_greedy
greater_is_better: false
max_steps: 120
warmup_steps: 10
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-7}
optim: adamw_torch
optim_args: rank=1
bf16: true
eval_strategy: epoch
save_strategy: no
logging_strategy: no
activation_checkpointing: true
use_peft: true
lora_r: 8
rollout_engine: vllm
vllm_url: http://h:1
importance_cap: 2
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--num_train_epochs 2", {"num_train_epochs": 2, "max_steps": -1}),
        ("--max_steps 3", {"max_steps": 3}),
        ("--lr_scheduler_type linear", {"lr_scheduler_kwargs": None}),
        (
            "--lr_scheduler_type cosine_with_min_lr",
            {"lr_scheduler_kwargs": {"min_lr": 1e-7}},
        ),
        ("--lr_scheduler_type constant", {"warmup_steps": 0, "lr_scheduler_kwargs": None}),
        ("--model_name_or_path n", {"model_revision": "main", "gguf_file": None}),
        ("--model_name_or_path m", {"model_revision": "v2", "gguf_file": "m.gguf"}),
        ("--model_name_or_path n --model_revision v3", {"model_revision": "v3"}),
        (
            "--dataset_name gsm8k",
            {"dataset_config": None, "dataset_path": None, "grader": None},
        ),
        ("--grader number", {"dataset_config": "main", "grader": "number"}),
        ("--metric_for_best_model eval_answer_logp", {"greater_is_better": True}),
        ("--optim sgd", {"optim": "sgd", "optim_args": None}),
        ("--optim_args rank=2", {"optim": "adamw_torch", "optim_args": "rank=2"}),
        ("--fp16 true", {"fp16": True, "bf16": False}),
        ("--bf16 false", {"bf16": False, "fp16": False}),
        ("--fp16 false", {"bf16": True, "fp16": False}),
        ("--eval_steps 7", {"eval_strategy": "steps", "eval_steps": 7}),
        ("--save_steps 7", {"save_strategy": "steps", "save_steps": 7}),
        ("--logging_steps 7", {"logging_strategy": "steps", "logging_steps": 7}),
        ("--save_steps 7 --save_strategy epoch", {"save_strategy": "epoch"}),
        ("--gradient_checkpointing false", {"activation_checkpointing": False}),
        ("--use_peft false", {"use_peft": False, "lora_r": 16}),
        ("--use_peft true", {"lora_r": 8}),
        (
            "--rollout_engine transformers",
            {"importance_cap": None, "vllm_url": "http://127.0.0.1:8000"},
        ),
        (
            "--rollout_engine transformers --rollout_dtype auto --importance_cap 2",
            {"rollout_dtype": "auto", "importance_cap": 2.0},
        ),
        ("--rollout_engine vllm", {"importance_cap": 2.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_command_line_beats_what_would_overrule_it_in_a_file(tmp_path, given, expected):
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    argv = ("--config", str(path), "--use_cpu", "true", *given.split())
    parsed = parse_arguments(CLASSES_OF_A_RUN, argv, prog="latro")
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        ("lora_r: 8", "--use_peft true", {"lora_r": 8}),
        ("grader: exact", "--dataset_name data.jsonl", {"grader": "exact"}),
        ("model_revision: v2", "--model_name_or_path m", {"model_revision": "v2"}),
        ("importance_cap: 2", "--rollout_engine vllm", {"importance_cap": 2.0}),
        ("vllm_url: http://h:1", "--rollout_engine vllm", {"vllm_url": "http://h:1"}),
        ("optim_args: rank=1", "--optim sgd", {"optim_args": "rank=1"}),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-7}",
            "--lr_scheduler_type cosine_with_min_lr",
            {"lr_scheduler_kwargs": {"min_lr": 1e-7}},
        ),
    ],
)
def test_a_file_may_leave_it_to_the_command_line_what_its_settings_are_for(
    tmp_path, file, given, expected
):
    path = tmp_path / "run.yaml"
    path.write_text(f"{file}\n")
    argv = ("--config", str(path), "--use_cpu", "true", *given.split())
    parsed = parse_arguments(CLASSES_OF_A_RUN, argv, prog="latro")
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["vllm_url", "vllm_weights_dir"])
def test_a_server_s_settings_are_refused_without_it(tmp_path, name):
    settings = {"output_dir": str(tmp_path), name: "http://h:1"}
    with pytest.raises(ValueError, match=rf"^{name}: expected rollout_engine='vllm' with http"):
        LatroConfig(**settings)
    assert getattr(LatroConfig(**settings, rollout_engine="vllm"), name) == "http://h:1"


@pytest.mark.parametrize("name", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_warm_up_that_a_schedule_does_not_have_is_refused(tmp_path, name):
    settings = {"output_dir": str(tmp_path), "lr_scheduler_type": name}
    assert LatroConfig(**settings, eval_strategy="steps").warmup_steps == 0
    with pytest.raises(ValueError, match=rf"^warmup_steps: expected 0 .*, got 10 with .*'{name}'"):
        LatroConfig(**settings, eval_strategy="steps", warmup_steps=10)
    assert LatroConfig(output_dir=str(tmp_path), warmup_steps=10).warmup_steps == 10


def test_a_file_beats_what_would_overrule_it_in_the_small_models_settings(tmp_path):
    args = parse_yaml(tmp_path, "num_train_epochs: 2\nsave_steps: 5\n")[2]
    assert (args.num_train_epochs, args.max_steps) == (2, -1)
    assert (args.save_strategy, args.save_steps) == ("steps", 5)
    # In one file together they keep transformers' own meaning.
    args = parse_yaml(tmp_path, "num_train_epochs: 2\nmax_steps: 5\nsave_strategy: no\n")[2]
    assert (args.max_steps, args.save_strategy) == (5, "no")


def test_the_command_line_alone_asks_for_evaluations_by_their_interval():
    args = parse("--model_name_or_path", "m", "--eval_steps", "7")[2]
    assert (args.eval_strategy, args.eval_steps) == ("steps", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"beta: 1\nkl_coef: 2\n", "beta is given twice, as kl_coef too"),
        (b"beta: \xff\n", "is not YAML: .*utf-8"),
        (b"lr_scheduler_kwargs: {day: 2024-13-45}\n", "is not YAML: month must be in"),
        (b"? [a]\n: 1\n", "is not YAML: .*unhashable"),
    ],
)
def test_a_file_that_cannot_be_read_as_settings_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^--config: .*run.yaml.*{message}") as caught:
        parse("--config", str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file_of_settings(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        parse("--config", str(tmp_path))


def test_the_command_line_beats_the_precision_that_accelerate_was_given(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse("--use_cpu", "true")[2].mixed_precision == "bf16"
    assert parse("--use_cpu", "true", "--bf16", "false")[2].mixed_precision == "no"
    assert parse("--use_cpu", "true", "--fp16", "false")[2].mixed_precision == "bf16"


@pytest.mark.parametrize("config", [LatroConfig, SftConfig])
def test_without_an_accelerator_it_is_the_cpu(config, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert config().use_cpu
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert not config().use_cpu


def test_processes_that_make_no_group_are_refused(monkeypatch):
    # A launched process on a device, such as Apple's, over which accelerate makes no group.
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("latro.config.training.is_torchelastic_launched", lambda: True)
    with pytest.raises(ValueError, match=r"use_cpu: expected True with several processes on a"):
        LatroConfig()


@pytest.mark.parametrize("name", ["output_dir", "dataset_name"])
def test_text_in_another_encoding_is_refused_before_a_run_that_could_not_save(name):
    with pytest.raises(ValueError, match=r"^arguments: expected text in UTF-8, got 'caf\\udce9'$"):
        parse(f"--{name}", b"caf\xe9".decode("utf-8", "surrogateescape"))

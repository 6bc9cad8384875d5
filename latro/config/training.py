"""The settings of training: `LatroConfig` and `SftConfig`, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed import is_torchelastic_launched
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import ParallelMode

from latro.config.engine import EngineArguments
from latro.config.fields import check_settings, json_object, one_of, setting
from latro.config.precedence import NO_WARMUP
from latro.config.ranges import above_zero, at_least, check_numbers
from latro.config.trackers import check_trackers
from latro.config.unsupported import check_loader, check_refused
from latro.objectives import OBJECTIVES

ASSETS = Path(__file__).parents[1] / "assets"
SMALL_MODEL = ASSETS / "small"
# Evaluation metrics by which the best model can be chosen; for each, more is better.
BEST_MODEL_METRICS = ("eval_accuracy_greedy", "eval_accuracy_sampled", "eval_answer_logp")
REWARD_TOKENS = ("all", "template+answer", "answer")
# Why objectives other than latro leave no choice of the tokens that count.
_OTHER_REWARDS = {
    "verifree": "whose reward is the probability of all of y",
    "jepo": "whose bound is on the likelihood of all of y",
    "rlpr": "whose reward is the mean over the answer's own tokens already",
    "sft": "which has no reward",
}
# Schedulers that step by an evaluation metric, and take it for a loss unless told otherwise.
_SCHEDULERS_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# transformers reads them where they begin as JSON does, and takes other text as it is.
_MAPPINGS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")


@dataclass
class AnswerConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what training on prompts with answers needs.

    Class attributes:
        title: name of the method in messages and help.

    Raises:
        ValueError: a setting is out of its range.
    """

    title: ClassVar[str]

    # Inherited fields with defaults of our own.
    per_device_eval_batch_size: int = setting(
        512, "Held-out problems that are sampled together, per device."
    )
    logging_steps: float = setting(1, "Number of updates between logs.")
    remove_unused_columns: bool | None = setting(
        False, "Not used: the prompt and answer columns are no arguments of the model."
    )
    eval_on_start: bool | None = setting(  # type: ignore[assignment]
        None,
        "Evaluate before the first update; the commands do so by default.",
        nargs="?",
        const=True,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "A checkpoint's folder; true: the newest one of the output folder; auto: that one, or none "
        "where there is none yet, so that the same command begins a run and goes on with it.",
    )
    dataloader_pin_memory: bool = setting(False, "Batches hold text; there is no tensor to pin.")
    # The parent's field takes only one name on the command line.
    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=list,
        metadata={
            "help": "Trackers to report to: tensorboard, wandb, trackio; several, all or none."
        },
    )

    eval_split: str = setting(
        "validation", "Held-out problems: validation, so that no choice is made on the test split."
    )
    num_eval_examples: int | None = setting(500, "Number of held-out problems to evaluate on.")
    max_completion_length: int = setting(
        500, "The longest rationale that is sampled, in tokens.", "response_length"
    )
    token_budget: int = setting(
        16384,
        "Tokens of one micro-batch through the trunk, halved where memory runs out; results "
        "differ only by rounding.",
    )
    max_skipped_updates: int = setting(
        3, "Number of NaN or infinite updates in a row that are skipped before the run stops."
    )
    backend: str = setting("auto", "Backend of the kernels: auto, reference, cpu, triton or cuda.")
    overwrite_output_dir: bool = setting(
        False, "Start even if the output folder has files of an earlier run, and delete those."
    )

    def __post_init__(self) -> None:
        check_refused(self)
        check_settings(self)
        by_metric = self.lr_scheduler_type in _SCHEDULERS_BY_METRIC
        if self.metric_for_best_model is None and (  # type: ignore[has-type]
            self.load_best_model_at_end or self.save_strategy == SaveStrategy.BEST or by_metric
        ):
            # The Trainer's own default is the loss on held-out rows, which is not computed here.
            self.metric_for_best_model = BEST_MODEL_METRICS[0]
        launched = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if not (self.deepspeed or launched or torch.accelerator.is_available()):
            # Without this the Trainer would not group processes that have no GPU: each would be a
            # separate run, all of them in one folder.
            self.use_cpu = True
        # Checked first, since the messages of transformers do not name the argument.
        check_numbers(self)
        for name in _MAPPINGS:
            # An older transformers has not all of them.
            if isinstance(text := getattr(self, name, None), str):
                json_object(name, text)
        try:
            super().__post_init__()
        except ValueError as error:
            if self.ddp_backend is None or "init_process_group" not in str(error):
                raise
            raise ValueError(
                f"ddp_backend: expected it left out with one process, which makes no group, got "
                f"{self.ddp_backend!r}; `accelerate launch -m` or `torchrun -m` start several"
            ) from error
        if is_torchelastic_launched() and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                f"use_cpu: expected True with several processes on a {self.device.type} device, "
                f"over which they make no group; got {self.use_cpu}"
            )
        check_loader(self.accelerator_config)
        # Checked again: mappings that were given as text have been parsed now.
        check_numbers(self)
        if by_metric:
            # With a relative threshold a worse model would pass where the metric is negative.
            told = {"mode": "max" if self.greater_is_better else "min", "threshold_mode": "abs"}
            given: Any = self.lr_scheduler_kwargs  # type: ignore[has-type]
            self.lr_scheduler_kwargs = told | (given or {})
        if self.warmup_steps and self.lr_scheduler_type in NO_WARMUP:
            raise ValueError(
                "warmup_steps: expected 0 with a schedule that has no warm-up, as "
                f"constant_with_warmup has, got {self.warmup_steps:g} with lr_scheduler_type="
                f"{self.lr_scheduler_type.value!r}"
            )
        if self.lr_scheduler_kwargs and self.lr_scheduler_type in _WITHOUT_ARGUMENTS:
            raise ValueError(
                f"lr_scheduler_kwargs: expected none with lr_scheduler_type="
                f"{self.lr_scheduler_type.value!r}, which reads none, got "
                f"{self.lr_scheduler_kwargs!r}"
            )
        check_trackers(self.report_to)
        self._check_best_model()
        at_least("max_completion_length", self.max_completion_length, 1)
        at_least("token_budget", self.token_budget, 1)
        at_least("max_skipped_updates", self.max_skipped_updates, 0)
        if self.num_eval_examples is not None:
            at_least("num_eval_examples", self.num_eval_examples, 1)
        one_of("backend", self.backend, ("auto", "reference", "cpu", "triton", "cuda"))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, got True")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process: expected one process per GPU; start with "
                "`accelerate launch -m` or `torchrun -m`, or set CUDA_VISIBLE_DEVICES"
            )
        if self.auto_find_batch_size and self.world_size > 1:
            raise ValueError(
                "auto_find_batch_size: expected False with several processes, since the others "
                "would wait for ever for one that begins again with a smaller batch; got True"
            )
        if self.fsdp and self.save_on_each_node:
            raise ValueError(
                "save_on_each_node: expected False with fsdp, whose checkpoints have a part of "
                "each process and lie where all see them; got True"
            )
        if self.fsdp and int((self.fsdp_config or {}).get("version", 2)) != 2:
            raise ValueError(f"fsdp_config: expected version 2, got {self.fsdp_config['version']}")
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            # Every trainable weight gets a gradient in every backward pass.
            self.ddp_find_unused_parameters = False

    def _check_best_model(self) -> None:
        if self.metric_for_best_model is None:
            return
        if self.metric_for_best_model.removeprefix("eval_") not in {
            name.removeprefix("eval_") for name in BEST_MODEL_METRICS
        }:
            raise ValueError(
                f"metric_for_best_model: expected one of {', '.join(BEST_MODEL_METRICS)}, got "
                f"{self.metric_for_best_model!r}"
            )
        if self.eval_split == "test":
            raise ValueError(
                "metric_for_best_model: expected a choice on problems held out of training "
                "(--eval_split validation); chosen on the test split a model's accuracy there is "
                "no longer that of a model that has not seen it"
            )
        by_evaluation = self.load_best_model_at_end or self.save_strategy == SaveStrategy.BEST
        if by_evaluation and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "eval_strategy: expected steps or epoch, since the best model is told by its "
                "evaluation, got no"
            )
        if (
            self.load_best_model_at_end
            and self.save_strategy == SaveStrategy.STEPS
            and self.eval_strategy == IntervalStrategy.STEPS
            and self.save_steps != self.eval_steps
        ):
            raise ValueError(
                "load_best_model_at_end: expected a checkpoint of every model that is evaluated "
                "(save_steps as eval_steps, or save_strategy best), got save_steps "
                f"{self.save_steps} and eval_steps {self.eval_steps}"
            )


@dataclass
class LatroConfig(EngineArguments, AnswerConfig):
    """The settings of LaTRO.

    A batch is a batch of prompts: `per_device_train_batch_size` prompts give
    `per_device_train_batch_size · num_generations` sequences, and `num_train_epochs` counts passes
    over the prompts. Defaults are those of the paper (arXiv 2411.04282).

    Raises:
        ValueError: a setting is out of its range.
    """

    title = "LaTRO"

    # Inherited fields with defaults of our own.
    output_dir: str = setting("runs/latro", "Where checkpoints, metrics and the model go.")
    learning_rate: float = setting(5e-7, "The initial learning rate.")
    per_device_train_batch_size: int = setting(3, "Prompts per device and step.")

    num_generations: int = setting(16, "K, rationales sampled for each prompt.", "rloo_k")
    temperature: float = setting(1.0, "Temperature of the policy, in sampling and in scoring.")
    objective: str = setting(
        "latro",
        "What to maximise: the answers' log-likelihood or a relative; see latro/objectives.py.",
        choices=list(OBJECTIVES),
    )
    rlpr_min_std: float = setting(
        0.01, "For rlpr: groups whose rewards (from 0 to 1) have no larger std are dropped."
    )
    beta: float = setting(0.05, "β, the weight of the KL to the initial model.", "kl_coef")
    kl: str = setting(
        "reward",
        "The KL's form: of sampled tokens in the reward, as the paper has it; exact over the "
        "vocabulary, in reward and loss, the same gradient with less noise; or the k3 estimate, in "
        "the loss.",
        choices=["reward", "k3", "exact"],
    )
    answer_weight: float = setting(
        1.0, "λ, the weight of the answer's likelihood gradient; rlpr has none."
    )
    answer_weight_warmup_steps: int = setting(
        0, "Updates over which λ rises linearly from 0 to --answer_weight; 0: it is there at once."
    )
    reward_tokens: str = setting(
        "all",
        "For latro: the tokens of y whose log-probs are the reward: all; all but the one that ends "
        "y; or the answer's own, without the template's. λ's gradient is that of all of y.",
        choices=list(REWARD_TOKENS),
    )
    unfinished: str = setting(
        "floor",
        "A rationale cut by the length limit gets the lowest reward of its group, or is left out.",
        choices=["floor", "exclude"],
    )
    importance_cap: float | None = setting(
        None,
        "C: a rationale token weighs min(π/μ, C), with μ the probability that vLLM or the copy of "
        "--rollout_dtype drew it with. Without it every token weighs 1, and the ratio is logged.",
    )
    async_rollouts: int = setting(
        0,
        "1: a vLLM server samples for the next update while this one is computed, so that "
        "rationales are of a policy one update old; 0: it waits.",
    )
    log_completions: bool = setting(False, "Print a table of sample rationales when logging.")
    num_completions_to_print: int = setting(
        4, "Rows of that table and of the trackers' table; 0: no table."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_generations", self.num_generations, 2, "leave-one-out needs two samples")
        at_least("beta", self.beta, 0)
        at_least("answer_weight", self.answer_weight, 0)
        self._check_answer_weight_warmup()
        at_least("rlpr_min_std", self.rlpr_min_std, 0)
        above_zero("temperature", self.temperature)
        at_least("num_completions_to_print", self.num_completions_to_print, 0)
        if self.reward_tokens != "all" and self.objective in _OTHER_REWARDS:
            raise ValueError(
                f"reward_tokens: expected all with objective={self.objective!r}, "
                f"{_OTHER_REWARDS[self.objective]}; got {self.reward_tokens!r}"
            )
        self.check_engine(self.temperature)
        if self.importance_cap is not None:
            above_zero("importance_cap", self.importance_cap)
            if self.rollout_engine != "vllm" and self.rollout_dtype is None:
                raise ValueError(
                    "importance_cap: expected rollout_engine='vllm' or a rollout_dtype with it, "
                    "since without them the policy itself samples; got "
                    f"rollout_engine={self.rollout_engine!r}"
                )
        self._check_async_rollouts()

    def _check_answer_weight_warmup(self) -> None:
        name, steps = "answer_weight_warmup_steps", self.answer_weight_warmup_steps
        at_least(name, steps, 0)
        if steps and self.objective == "rlpr":
            raise ValueError(
                f"{name}: expected 0 with objective='rlpr', which has no λ, got {steps}"
            )

    def answer_weight_at(self, step: int) -> float:
        """Return λ of the update after `step` updates: λ·min(1, step / warm-up).

        A function of the step alone, so that a resumed run goes on where it was.
        """
        warmup = self.answer_weight_warmup_steps
        return self.answer_weight * min(1.0, step / warmup) if warmup else self.answer_weight

    def _check_async_rollouts(self) -> None:
        if self.async_rollouts not in (0, 1):
            raise ValueError(f"async_rollouts: expected 0 or 1, got {self.async_rollouts}")
        if not self.async_rollouts:
            return
        if self.rollout_engine != "vllm" or self.vllm_mode != "server":
            raise ValueError(
                "async_rollouts: expected rollout_engine='vllm' and vllm_mode='server' with 1, "
                "since others sample on the device that computes the update; got "
                f"{self.rollout_engine!r} and {self.vllm_mode!r}"
            )
        if self.importance_cap is None:
            raise ValueError(
                "async_rollouts: expected importance_cap with 1, 2 for example, since the "
                "rationales are of a policy one update old; got none"
            )
        if self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: expected false with async_rollouts 1, since a checkpoint holds "
                "the rollouts of the prompts that come next; got true"
            )


@dataclass
class SftConfig(AnswerConfig):
    """The settings of supervised fine-tuning.

    Raises:
        ValueError: a setting is out of its range.
    """

    title = "SFT"

    # Inherited fields with defaults of our own.
    output_dir: str = setting("runs/sft", "Where checkpoints, metrics and the model go.")
    learning_rate: float = setting(1e-5, "The initial learning rate.")

    target: str = setting(
        "rationale",
        "What to learn: the written rationale with the answer after it, or the answer alone.",
        choices=["rationale", "answer"],
    )

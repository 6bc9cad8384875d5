"""Pre-train a small model on generated text alone.

It is the model that ships, or one to replicate the paper's claim with.

A document is a problem of a task's train split, a rationale, and the right answer:

    Tom has 10 pens. Tom loses 2. Tom gets 7. How many? 10 - 2 = 8. 8 + 7 = 15. The answer is 15

The rationale is of one of four kinds, by a mixture. Steps make the answer likely, filler does not,
and the model writes both: that leaves LaTRO something to choose from. Where the steps have a slip
the answer is still right, so that a slip costs little likelihood; without these documents a single
slip costs more than guessing, and reasoning does not pay.

The models of the study read fewer documents than the one that ships: they do not learn to tell
stories, and they learn to count, which is most of the work, from right steps alone before they meet
the mixture. A model of `arithmetic_choice` goes on from one of `arithmetic`, which counts already.

    python -m studies.replicate.pretrain --output_dir latro/assets/small
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from latro.config.fields import setting
from latro.config.training import SMALL_MODEL
from latro.errors import exit_with
from latro.tasks.arithmetic import Arithmetic, GeneratedTask, Problem
from latro.tasks.arithmetic_choice import ArithmeticChoice
from studies.command import check_model_folder

TASKS: dict[str, GeneratedTask] = {task.name: task for task in (Arithmetic(), ArithmeticChoice())}
MIXTURE = {"steps": 0.30, "slip": 0.15, "filler": 0.45, "nothing": 0.10}
# Having read steps first, the study's models would rather write those than not. A guess among four
# options is worth more than steps that often slip, and then LaTRO drops all rationales.
STUDY_MIXTURES = {
    "arithmetic": {"steps": 0.25, "slip": 0.12, "filler": 0.53, "nothing": 0.10},
    "arithmetic_choice": {"steps": 0.35, "slip": 0.03, "filler": 0.52, "nothing": 0.10},
}
# What sets each apart from the others is what sets their large namesakes apart: heads that share
# keys and values in Mistral, projections in one piece and rotation of a part in Phi-3.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 384},
    "mistral": {"intermediate_size": 448, "num_key_value_heads": 2, "sliding_window": None},
    "phi3": {"intermediate_size": 384, "pad_token_id": None},
}
SHIPPED = ("llama", "arithmetic")
SHIPPED_SETTINGS = {
    "steps": 1600,
    "right_steps": 0,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "learn_prompts": True,
}
_COMPLETIONS = {"batch_size": 16, "learn_prompts": False}
STUDY_SETTINGS: dict[str, dict[str, Any]] = {
    "arithmetic": {"steps": 3200, "right_steps": 1700, "learning_rate": 3e-3, **_COMPLETIONS},
    "arithmetic_choice": {"steps": 1100, "right_steps": 300, "learning_rate": 2e-3, **_COMPLETIONS},
}
FILLER = ("This is not hard.", "I will count them.", "We add and take away.")
EOS = "<eos>"
IGNORE_INDEX = -100


@dataclass
class Arguments:
    """Settings of one pre-training run; the defaults make the model that ships.

    Where None stands, the architecture and the task decide, by `SHIPPED_SETTINGS` or
    `STUDY_SETTINGS`.
    """

    output_dir: Path = field(metadata={"help": "Folder to write; a model in it is replaced."})
    architecture: Literal["llama", "mistral", "phi3"] = setting("llama", "Of the model.")
    task: Literal["arithmetic", "arithmetic_choice"] = setting(
        "arithmetic", "Whose problems it reads."
    )
    start_from: str | None = setting(
        None, "For arithmetic_choice: a model of arithmetic; without it the llama that ships."
    )
    steps: int = setting(None, "Optimizer steps.")
    right_steps: int = setting(None, "So many of them first read right steps alone.")
    batch_size: int = setting(None, "Documents a step.")
    learning_rate: float = setting(None, "Peak; cosine to zero.")
    learn_prompts: bool = setting(None, "Learn to tell the stories too, not completions alone.")
    warmup_steps: int = setting(50, "Steps to the peak.")
    vocab_size: int = setting(512, "At most, bytes and <eos> included.")
    tokenizer_documents: int = setting(20_000, "To train the BPE on.")
    seed: int = setting(42, "Of text, weights and order.")

    def __post_init__(self) -> None:
        for name, value in (SHIPPED_SETTINGS if self.ships else STUDY_SETTINGS[self.task]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.task == "arithmetic" and self.start_from is not None:
            raise ValueError(f"start_from: expected none for arithmetic, got {self.start_from!r}")
        if self.task == "arithmetic_choice" and self.start_from is None:
            if self.architecture != "llama":
                raise ValueError(
                    f"start_from: expected a {self.architecture} of arithmetic, got none"
                )
            self.start_from = str(SMALL_MODEL)

    @property
    def ships(self) -> bool:
        return (self.architecture, self.task) == SHIPPED

    @property
    def mixture(self) -> Mapping[str, float]:
        return MIXTURE if self.ships else STUDY_MIXTURES[self.task]


def generate_documents(
    task: GeneratedTask, seed: int, mixture: Mapping[str, float] = MIXTURE, right: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield prompts with their completions, both without EOS, without end.

    The first `right` have right steps, whatever the mixture.
    """
    rng = random.Random(f"documents {seed}")
    kinds, weights = zip(*mixture.items(), strict=True)
    for index, problem in enumerate(task.problems("train", seed)):
        kind = "steps" if index < right else rng.choices(kinds, weights)[0]
        sentences = [*rationale(problem, kind, rng), f"{task.answer_template} {problem.answer}"]
        yield problem.prompt, "".join(f" {sentence}" for sentence in sentences)


def rationale(problem: Problem, kind: str, rng: random.Random) -> list[str]:
    """Return the sentences of one rationale; `kind` is a key of the mixtures."""
    if kind == "nothing":
        return []
    if kind == "filler":
        return ["Let me see.", *rng.sample(FILLER, rng.randint(0, 2))]
    if kind == "slip":
        return problem.steps(slip=(rng.randrange(len(problem.changes)), rng.choice((-2, -1, 1, 2))))
    return problem.steps()


def train_tokenizer(args: Arguments) -> PreTrainedTokenizerFast:
    """Return a lossless byte-level BPE: frequent words are one token, each digit is its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    documents = generate_documents(TASKS[args.task], args.seed, args.mixture)
    bpe.train_from_iterator(
        ("".join(document) for document in islice(documents, args.tokenizer_documents)),
        trainers.BpeTrainer(
            vocab_size=args.vocab_size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def build_model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        **ARCHITECTURES[architecture],
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


def make_batch(
    documents: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, learn_prompts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `labels`, both [documents, longest] int64, padded on the right.

    Padding follows every token that has a label, so causal attention needs no mask.
    """
    ids = tokenizer([prompt + completion + EOS for prompt, completion in documents]).input_ids
    longest = max(map(len, ids))
    input_ids = torch.full((len(ids), longest), tokenizer.eos_token_id)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, document in enumerate(ids):
        input_ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
    if not learn_prompts:
        for row, prompt in enumerate(tokenizer([prompt for prompt, _ in documents]).input_ids):
            labels[row, : len(prompt)] = IGNORE_INDEX
    return input_ids, labels


def start(args: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model that is trained, and its tokenizer: new ones, or those to go on from."""
    if args.start_from is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.start_from)
        return AutoModelForCausalLM.from_pretrained(args.start_from), tokenizer
    tokenizer = train_tokenizer(args)
    set_seed(args.seed)
    return build_model(args.architecture, tokenizer), tokenizer


def pretrain(
    args: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
    right = args.right_steps * args.batch_size
    documents = generate_documents(TASKS[args.task], args.seed, args.mixture, right)
    progress = trange(args.steps, desc="pre-training", unit="step")
    for _ in progress:
        batch = list(islice(documents, args.batch_size))
        input_ids, labels = make_batch(batch, tokenizer, args.learn_prompts)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Write the whole folder beside its place, then move it there, so no model is half written."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".pretrain-") as scratch:
        written = Path(scratch) / "new"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        if output_dir.exists():
            shutil.move(output_dir, Path(scratch) / "old")
        written.rename(output_dir)


def main() -> None:
    prog = "python -m studies.replicate.pretrain"
    (args,) = HfArgumentParser([Arguments], prog=prog).parse_args_into_dataclasses()
    check_model_folder(args.output_dir)
    model, tokenizer = start(args)
    save(pretrain(args, model, tokenizer), tokenizer, args.output_dir)


if __name__ == "__main__":
    exit_with("studies.replicate.pretrain", main)

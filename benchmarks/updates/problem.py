"""What the contenders of `step.py` work on: models, prompts and samples of given lengths.

Weights are random, or those of a model that is given; words are numbers, and lengths are exact: a
prompt has P tokens, a rationale from `rationale[0]` to `rationale[1]`, evenly spread within each
group and the end token included, an answer A, its template and end token included. A model that
reads numbers never ends a rationale by itself; `stops_by_chance` makes it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from latro.engines.transformers import caches_in
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.sequences import Rollout, Sample
from latro_kernels import LinearSample

TEMPLATE = "The answer is"
_NAMED = ("<eos>", "<unk>", *TEMPLATE.split())  # every other word is its token id, written out


@dataclass(frozen=True)
class ModelSize:
    """A Llama with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    dtype: str = "float32"


@dataclass(frozen=True)
class Setting:
    """Sizes of one update: G prompts of P tokens, K rationales each, answers of A, vocabulary V.

    `model` is of random weights, or the name or folder of a model, used in fp32, whose head has V
    rows.
    """

    model: ModelSize | str
    G: int
    K: int
    P: int
    rationale: tuple[int, int]
    A: int
    V: int

    @property
    def lengths(self) -> list[int]:
        """The lengths of a group's K rationales: evenly spread, the end token included."""
        low, high = self.rationale
        return [low + (high - low) * k // (self.K - 1) for k in range(self.K)]


SMALL = ModelSize(hidden=384, intermediate=1024, layers=8, heads=6, kv_heads=2)
LLAMA_1B = ModelSize(  # Llama-3.2-1B
    hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, dtype="bfloat16"
)
TINY = ModelSize(hidden=16, intermediate=32, layers=2, heads=2, kv_heads=1, head_dim=8)
QUICK = Setting(TINY, G=2, K=4, P=11, rationale=(3, 9), A=6, V=199)
CPU = Setting(SMALL, G=1, K=8, P=150, rationale=(50, 250), A=8, V=32000)
# A short question with short rationales, for models of which an update takes long on a CPU.
SHORT = Setting(SMALL, G=1, K=8, P=100, rationale=(20, 64), A=8, V=32000)
GPU = Setting(LLAMA_1B, G=3, K=16, P=150, rationale=(50, 500), A=8, V=128256)


def of_model(name: str, sizes: Setting = SHORT) -> Setting:
    """Return `sizes` with the model of that name or folder.

    Raises:
        OSError, ValueError: it has no configuration that transformers can read.
    """
    config = AutoConfig.from_pretrained(name).get_text_config()
    return replace(sizes, model=name, V=config.vocab_size)


class StepProblem:
    """Tokenizer, data and models of a setting, the same at every call.

    Raises:
        ValueError: the setting leaves no room for the answer's template, a word and the end token.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        if setting.A < 5:
            raise ValueError(
                f"A: expected at least 5, template, word and end token, got {setting.A}"
            )
        self.setting = setting
        self.device = device
        self.tokenizer = _tokenizer(setting.V)
        self.join = AnswerJoin(self.tokenizer, TEMPLATE, [self.tokenizer.eos_token_id])

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Make a new policy and reference; the reference is the policy some updates ago."""
        policy = self._policy().to(self.device)
        # The tokenizer's own end token, wherever a model or a trainer may look for it.
        for config in (policy.config, policy.generation_config):
            config.bos_token_id = config.pad_token_id = None
            config.eos_token_id = self.tokenizer.eos_token_id
        reference = copy.deepcopy(policy).requires_grad_(False).eval()
        for parameter in reference.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
        return policy.train(), reference

    def _policy(self) -> PreTrainedModel:
        size, V = self.setting.model, self.setting.V
        torch.manual_seed(0)
        if isinstance(size, str):
            model = AutoModelForCausalLM.from_pretrained(size, dtype=torch.float32)
            # A copy, for else its pages are read from the file when an update first needs them, and
            # count as the update's memory.
            return copy.deepcopy(model)
        config = LlamaConfig(
            vocab_size=V,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            max_position_embeddings=8192,
            # Logits of standard deviation 1: rewards and KL then differ between samples.
            initializer_range=size.hidden**-0.5,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(getattr(torch, size.dtype))

    def rows(self, count: int | None = None) -> list[dict[str, str]]:
        """Make `count` dataset rows, or G of them."""
        tokens = random.Random(0)
        answer = self.setting.A - len(TEMPLATE.split()) - 1
        return [
            {
                "prompt": " ".join(map(str, self._words(tokens, self.setting.P))),
                "answer": " ".join(map(str, self._words(tokens, answer))),
            }
            for _ in range(count or self.setting.G)
        ]

    def groups(self) -> list[list[Rollout]]:
        """Make rollouts of G prompts whose rationales have the lengths of the setting."""
        tokens = random.Random(1)
        return self.join_all(
            [
                [self._words(tokens, length - 1) for length in self.setting.lengths]
                for _ in range(self.setting.G)
            ]
        )

    def join_all(self, samples: Sequence[Sequence[list[int]]]) -> list[list[Rollout]]:
        """Make rollouts of the prompts, each sample ended by the end token."""
        end = self.tokenizer.eos_token_id
        return [
            [
                self.join(
                    self.tokenizer.encode(row["prompt"]), Sample([*sample, end]), row["answer"]
                )
                for sample in of_group
            ]
            for row, of_group in zip(self.rows(), samples, strict=True)
        ]

    def _words(self, tokens: random.Random, count: int) -> list[int]:
        return [tokens.randrange(len(_NAMED), self.setting.V) for _ in range(count)]


@contextmanager
def stops_by_chance(model: PreTrainedModel, setting: Setting, end: int) -> Iterator[None]:
    """Within it, rationales that `model` samples end with token `end`, at lengths drawn uniformly.

    A rationale that has not ended before token n ends with it with probability 1/(high − n + 1),
    n from low to high: then each length has the same probability. The model's logits are changed,
    or what it samples where it makes no logits, so that sampling, stopping and whatever shrinks a
    batch work as they do in earnest.
    """
    low, high = setting.rationale

    def draw(token: int, seed: int, number: int) -> int:
        # Of the row's own seed, so that lengths do not depend on which rows are decoded together.
        left = high - number
        if number + 1 >= low and random.Random(f"{seed} {number}").random() < 1 / max(1, left):
            return end
        return token if token != end else end + 1

    def bend(
        module: nn.Module,
        args: object,
        kwargs: Mapping[str, Any],
        output: CausalLMOutputWithPast | LinearSample,
    ) -> LinearSample | None:
        if isinstance(output, LinearSample):
            rows = kwargs["head_rows"]
            drawn = torch.stack([output.token, rows.seed, rows.number], dim=1).tolist()
            tokens = [draw(token, seed, number) for token, seed, number in drawn]
            return output._replace(token=output.token.new_tensor(tokens))
        if not isinstance(output, CausalLMOutputWithPast):
            return None
        caches = [*caches_in(output).values()]
        if not caches:
            return None  # TRL scores in the same breath, without a cache
        length = caches[0].get_seq_length() - setting.P + 1
        logits = output.logits[:, -1]
        logits[:, end] = -math.inf
        if low <= length < high:
            odds = 1 / (high - length)
            logits[:, end] = logits.float().logsumexp(dim=1).to(logits.dtype) + math.log(odds)
        elif length >= high:
            logits.fill_(-math.inf)
            logits[:, end] = 0.0
        return None

    hook = model.register_forward_hook(bend, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    words = [*_NAMED, *map(str, range(len(_NAMED), vocab_size))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")

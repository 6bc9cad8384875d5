"""Sampling rationales: K completions a prompt from one shared prefill.

A completion z ends at the end-of-sequence token, where its decoded text shows the answer template
("The answer is"), or at the length limit. The sampled token ids are kept and scored as they are;
the answer y = template + answer + end-of-sequence is joined to them as it tokenizes in context:

    ended by        tokens of z                        the model reads         answer rows
    the template    all, the template's included       x  z  rest of y         the template as
                                                                               sampled, rest of y
    end of seq.     all, the end token included        x  z without it  y      y
    length limit    all                                x  z  y                 y

So the event that ends a rationale is an action of the policy in each case, and every sample's
answer rows spell the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)


@dataclass(frozen=True)
class Rollout:
    """One prompt, one sampled rationale and the answer joined to it, as token ids."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    """The rationale z with the token or tokens that ended it: what log π(z|x) sums over."""
    answer_ids: list[int]
    """The answer y: what log π(y|x⊕z) sums over."""
    answer_start: int
    """How many sampled tokens stand before y."""
    finished: bool
    """False where the length limit ended the rationale."""

    @property
    def input_ids(self) -> list[int]:
        """What the model reads: everything but y's last token, which nothing follows."""
        return self.prompt_ids + self.sampled_ids[: self.answer_start] + self.answer_ids[:-1]

    @property
    def rationale_ids(self) -> list[int]:
        """z without the token or tokens that ended it."""
        return self.sampled_ids[: self.answer_start]


class TemplateStop(StoppingCriteria):
    """Ends a row where its decoded text shows `template`, and keeps each row's length.

    Decoded text is matched and not token ids, because the same words can be cut into tokens in
    many ways. The lengths make padding unnecessary for finding ends, so that a tokenizer whose
    padding token is its end token is no special case.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        num_rows: int,
        eos_token_ids: Sequence[int],
        template: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.eos_token_ids = frozenset(eos_token_ids)
        self.template = template
        # A token stands for at least one byte, or for nothing visible at the start of the window.
        self.window = len(template.encode()) + 4 if template else 1
        self.lengths = [0] * num_rows
        self.done = [False] * num_rows

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
    ) -> torch.BoolTensor:
        start = max(self.prompt_length, input_ids.shape[1] - self.window)
        tails = input_ids[:, start:].tolist()
        open_rows = [row for row, done in enumerate(self.done) if not done]
        texts = (
            decode_batch(self.tokenizer, [tails[row] for row in open_rows])
            if self.template
            else [""] * len(open_rows)
        )
        for row, text in zip(open_rows, texts, strict=True):
            self.lengths[row] = input_ids.shape[1] - self.prompt_length
            self.done[row] = tails[row][-1] in self.eos_token_ids or (
                self.template is not None and self.template in text
            )
        return torch.tensor(self.done, device=input_ids.device)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids to the letter: nothing skipped, no spaces tidied."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_batch(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """`decode` for many rows."""
    return tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    template: str | None = None,
) -> list[list[list[int]]]:
    """Sample `num_samples` completions of each prompt from the model's whole distribution.

    Args:
        model: a causal language model; put into eval mode for the call.
        tokenizer: decodes the text that `template` is looked for in.
        prompts: token ids, none empty.
        num_samples: completions of one prompt; they share its prefill.
        max_new_tokens: the length limit.
        temperature: 0 takes the likeliest token.
        seed: decides the samples; the global random state is left as it was.
        template: a completion also ends with the token that completes this text.

    Returns:
        For each prompt its completions' token ids, the token that ended them included.
    """
    eos = eos_token_ids(model, tokenizer)
    device = model.device
    width = max(len(p) for p in prompts)
    # The padding is masked, so its id is never seen by a real token and any id will do.
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    stop = TemplateStop(tokenizer, width, len(prompts) * num_samples, eos, template)

    was_training = model.training
    model.eval()
    # A model's own generation config may cut the distribution (top-k, top-p, penalties). Samples
    # from a cut distribution are not samples of the policy, so a plain one stands in for it.
    own_config = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        # Without top_k=0 the library's default of 50 would apply.
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )
    cuda = [device] if device.type == "cuda" else []
    try:
        cache = _prefill(model, ids, mask)
        cache.batch_repeat_interleave(num_samples)
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            output = model.generate(
                ids.repeat_interleave(num_samples, dim=0),
                attention_mask=mask.repeat_interleave(num_samples, dim=0),
                past_key_values=cache,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
    finally:
        model.generation_config = own_config
        model.train(was_training)

    rows = [r[:n] for r, n in zip(output[:, width:].tolist(), stop.lengths, strict=True)]
    return [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]


def _prefill(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """The keys and values of every prompt token but the last, which generation reads itself."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
    return cache


class AnswerJoin:
    """Joins an answer to a sampled rationale, token by token as it reads in context.

    Args:
        tokenizer: any tokenizer; special tokens are never added.
        template: the words an answer begins with, "The answer is".
        eos_token_ids: what ends a completion; the first of the tokenizer's own ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, eos_token_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.eos_token_ids = frozenset(eos_token_ids)
        end = tokenizer.eos_token_id
        if end is None and eos_token_ids:
            end = eos_token_ids[0]
        self.end_ids = [] if end is None else [end]

    def __call__(self, prompt_ids: list[int], sampled_ids: list[int], answer: str) -> Rollout:
        """The rollout of one completion; what follows its first answer template is dropped."""
        span = self._find_template(sampled_ids)
        if span is not None:
            start, end = span
            sampled_ids = sampled_ids[:end]
            spelled = decode(self.tokenizer, sampled_ids[start:])
            rest = "" if spelled[-1].isspace() else " "
            answer_ids = sampled_ids[start:] + self._ids_after(self.template, rest + answer)
            return self._rollout(prompt_ids, sampled_ids, answer_ids, start, finished=True)

        finished = bool(sampled_ids) and sampled_ids[-1] in self.eos_token_ids
        start = len(sampled_ids) - finished
        before = decode(self.tokenizer, (prompt_ids + sampled_ids[:start])[-4:])
        # A stand-in for what comes before: whether a space opens y is all that matters of it.
        anchor, space = ("\n", "") if before[-1:].isspace() else (".", " ")
        answer_ids = self._ids_after(anchor, f"{space}{self.template} {answer}")
        return self._rollout(prompt_ids, sampled_ids, answer_ids, start, finished=finished)

    def _rollout(
        self,
        prompt_ids: list[int],
        sampled_ids: list[int],
        answer_ids: list[int],
        answer_start: int,
        *,
        finished: bool,
    ) -> Rollout:
        return Rollout(prompt_ids, sampled_ids, answer_ids + self.end_ids, answer_start, finished)

    def _find_template(self, ids: list[int]) -> tuple[int, int] | None:
        """The tokens [start, end) that spell the first template, or None."""
        if self.template not in decode(self.tokenizer, ids):
            return None
        # Both ends by bisection: a longer prefix keeps the match, and so does a longer suffix.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.template in decode(self.tokenizer, ids[:middle]):
                high = middle
            else:
                low = middle + 1
        end = high
        start = end - 1
        while start > 0 and self.template not in decode(self.tokenizer, ids[start:end]):
            start -= 1
        return start, end

    def _ids_after(self, before: str, text: str) -> list[int]:
        """The tokens of `text` where `before` stands in front of it."""
        encode = self.tokenizer.encode
        prefix = encode(before, add_special_tokens=False)
        whole = encode(before + text, add_special_tokens=False)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return whole[len(prefix) :]
        # The two merge across the border; the text on its own is the nearest that keeps the ids.
        return encode(text, add_special_tokens=False)

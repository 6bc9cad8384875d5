"""How likely the policy finds the known answer after its own completion, as a reward for TRL.

With a prompt x, a completion z and the known answer y, of which own(y) are the tokens that hold a
character of the answer itself:

    objective   reward of z                                                         arXiv
    latro       log π(y|x⊕z)                                                        2411.04282
    verifree    π(y|x⊕z)                                                            2505.21493
    rlpr        clip(mean_{t∈own(y)} p(y_t|x⊕z) − mean_{t∈own(y)} p(y_t|x), 0, 1)   2506.18254

A completion ends, and the answer is joined to it, by the rules of `latro.rollout.answer_join`: the
answer stands in the place of what the completion says after its first answer template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config.fields import one_of
from latro.integrations.trl.images import image_inputs, image_rows
from latro.integrations.trl.seam import SCORES, check_seam, trainer_of
from latro.model.adapters import without_wrapper
from latro.model.distribution import forget_forwards
from latro.model.forwards import evaluation_mode
from latro.model.packing import plan
from latro.model.scoring import Scorer
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.frame import Chat
from latro.rollout.sequences import Rollout, Sample, eos_token_ids
from latro.update.processes import agreed_pieces
from latro_kernels import floored
from latro_kernels.integrations.logits import layers_gathered

OBJECTIVES = ("latro", "verifree", "rlpr")
UNFINISHED = ("floor", "exclude")
# What a process scores where the others have more pieces; any vocabulary has a first token.
_FILLER = Rollout([0], [], [0], answer_start=0, finished=True, plain=True)


class AnswerLikelihood:
    """A reward function for TRL's `RLOOTrainer` and `GRPOTrainer`.

    The dataset has a column `answer`. The policy that is being trained scores, in evaluation mode
    and at the temperature that it samples with; completions of one prompt share it, where the
    model's attention can do that. Prompts are tokenized by the trainer, so that chat templates and
    tools are read as the policy read them. After images the trainer's own forward scores.

    Args:
        model: the model that the trainer is given; make the reward before the trainer.
        tokenizer: the model's tokenizer.
        objective: "latro", "verifree" or "rlpr", as above.
        answer_template: the words that an answer begins with.
        unfinished: what a completion gets that the length limit ended: "floor", the lowest reward
            of its group; "exclude", none, so that TRL leaves it out where no other function has a
            reward for it.
        token_budget: positions of one forward.

    Attributes:
        rollouts: the completions of the last call with their answers, in their order.

    Raises:
        ValueError: an unknown choice, or a model that cannot be scored.
        TypeError: `tokenizer` is no tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        objective: str = "latro",
        answer_template: str = "The answer is",
        unfinished: str = "floor",
        token_budget: int = 16384,
    ) -> None:
        one_of("objective", objective, OBJECTIVES)
        one_of("unfinished", unfinished, UNFINISHED)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                "tokenizer: expected a tokenizer, such as a processor has as its .tokenizer, got "
                f"{type(tokenizer).__name__}"
            )
        self.objective = objective
        self.unfinished = unfinished
        self.token_budget = token_budget
        with layers_gathered(model):
            self.scorer = Scorer(model)
        self.tokenizer = tokenizer
        self.answer_template = answer_template
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._reading: tuple[Chat, bool] | None = None
        self._read_as(Chat(), framed=True)
        self.rollouts: list[Rollout] = []

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completion_ids: Sequence[list[int]],
        log_metric: Any,
        answer: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return the reward of each completion, None for what is excluded; TRL calls this.

        Raises:
            ValueError: there is no column `answer`, or no text in it, the trainer trains another
                model, or has other reward functions beside one that excludes completions.
            NotImplementedError: images come in tiles, or TRL did not tokenize the prompts.
            RuntimeError: this version of TRL has other trainers.
        """
        if answer is None:
            raise ValueError("dataset: expected a column answer for AnswerLikelihood, got none")
        for known in answer:
            if not isinstance(known, str) or not known.strip():
                raise ValueError(
                    "dataset: expected a non-empty string in the column answer for "
                    f"AnswerLikelihood, got {known!r}"
                )
        trainer = trainer_of(log_metric)
        check_seam(
            "AnswerLikelihood",
            trainer,
            _tokenize_prompts="prompts",
            _get_per_token_logps_and_entropies=SCORES,
        )
        self._check_model(trainer)
        if self.unfinished == "exclude" and len(trainer.reward_funcs) > 1:
            # TRL sums what there is, and a log-likelihood that is missing is more than any other.
            raise ValueError(
                "unfinished: expected 'floor' where the trainer has other reward functions, of "
                "which alone TRL would make the reward of a completion that is left out here; got "
                f"'exclude' and {len(trainer.reward_funcs)} functions"
            )
        self.scorer.temperature = trainer.temperature
        if getattr(trainer, "rollout_func", None) is not None:
            raise NotImplementedError(
                "rollout_func: expected none with AnswerLikelihood, which has the trainer tokenize "
                "the prompts; got one, which may do it in another way"
            )
        prompt_ids, images, _ = trainer._tokenize_prompts(list(prompts))
        # TRL puts conversations into the chat template, and no text.
        framed = not isinstance(prompts[0], str)
        arguments = trainer.chat_template_kwargs if framed else {}
        self._read_as(Chat(template_kwargs=arguments), framed=framed)
        inputs = None if images is None else image_inputs(trainer, prompts, images, prompt_ids)
        self.rollouts = [
            self._join(list(ids), completion, known)
            for ids, completion, known in zip(prompt_ids, completion_ids, answer, strict=True)
        ]
        # Without dropout, and without recomputing what no backward will ask for.
        with evaluation_mode(trainer.model):
            if inputs is None:
                reward = self._rewards(answer, trainer)
            else:
                reward = self._rewards_after_images(answer, trainer, inputs)
        finished = [rollout.finished for rollout in self.rollouts]
        if self.unfinished == "exclude":
            return [r if f else None for r, f in zip(reward.tolist(), finished, strict=True)]
        K = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        # TRL deals out the groups of all processes in a line, so that several may share one.
        every = gather(reward).view(-1, K)
        has_own = gather(torch.tensor(finished, device=reward.device)).view(-1, K)
        first = trainer.accelerator.process_index * len(reward)
        return floored(every, has_own).flatten()[first : first + len(reward)].tolist()

    def score(
        self, rollouts: Sequence[Rollout], accelerator: Accelerator, caller: nn.Module
    ) -> list[Tensor]:
        """Return log-probs of the answer's tokens in each of `answer_rows`' rollouts.

        Those of one prompt that stand side by side share it. All processes must call this together.

        Args:
            rollouts: what `answer_rows` returns.
            accelerator: knows the precision, and the other processes.
            caller: the policy, in what the engine has wrapped around it.

        Returns:
            fp32 [tokens] each, in nats; differentiable.
        """
        scorer = self.scorer
        scorer.caller = caller
        groups = [list(group) for _, group in groupby(rollouts, key=lambda r: r.prompt_ids)]
        micros = plan(groups, self.token_budget, packed=scorer.packed, boundary=scorer.boundary)
        pieces = [piece for micro in micros for piece in micro]
        (count,) = agreed_pieces([len(pieces)], accelerator)
        found: dict[int, Tensor] = {}
        for piece in pieces + [[[_FILLER]]] * (count - len(pieces)):
            batch = scorer.collate(piece)
            with accelerator.autocast():
                logp = scorer(batch).logp
            members = [rollout for group in piece for rollout in group]
            rows = logp.split([len(rollout.own_rows) for rollout in members])
            found.update(zip(map(id, members), rows, strict=True))
        forget_forwards(scorer.model, accelerator)
        logps = [found[id(rollout)] for rollout in rollouts]
        if count > len(pieces):
            # Every forward takes part in a backward, as it does in the other processes.
            logps[0] = logps[0] + 0 * found[id(_FILLER)].sum()
        return logps

    def _check_model(self, trainer: Any) -> None:
        causal = without_wrapper(trainer.accelerator.unwrap_model(trainer.model))
        if causal is not self.scorer.causal:
            raise ValueError(
                f"model: expected the {type(causal).__name__} that the trainer trains, got another "
                "model; hand the same one to both"
            )

    def _read_as(self, chat: Chat, *, framed: bool) -> None:
        """Have answers joined to prompts that a template with these arguments has rendered.

        They decide whether the model thinks. Text that is not in the template is followed by no
        thoughts.
        """
        if (chat, framed) != self._reading:
            self.join = AnswerJoin(
                self.tokenizer, self.answer_template, self.eos_token_ids, chat, framed=framed
            )
            self._reading = (chat, framed)

    def _join(self, prompt_ids: list[int], completion: list[int], answer: str) -> Rollout:
        """Return the rollout of a completion; padding at its end tells of a stop string."""
        pad, ends = self.join.tokenizer.pad_token_id, self.join.eos_token_ids
        count = len(completion)
        while count and completion[count - 1] == pad and pad not in ends:
            count -= 1
        rollout = self.join(prompt_ids, Sample(completion[:count]), answer)
        return replace(rollout, finished=rollout.finished or count < len(completion))

    @torch.no_grad()
    def _rewards(self, answer: Sequence[str], trainer: Any) -> Tensor:
        """Return the reward of each rollout, fp64 [S], whatever ended it."""
        own = self.objective == "rlpr"
        scored: list[Rollout] = []
        counts: list[int] = []
        for (prompt_ids, known), group in groupby(
            zip(self.rollouts, answer, strict=True), key=lambda pair: (pair[0].prompt_ids, pair[1])
        ):
            members = [answer_rows(rollout, own=own) for rollout, _ in group]
            counts.append(len(members))
            scored += members
            if own:
                # The answer without a rationale, once for its group.
                scored.append(replace(self.join(prompt_ids, Sample([]), known), plain=True))
        rows = self.score(scored, trainer.accelerator, trainer.model)
        if not own:
            return answer_value(rows, self.objective)
        means = _mean_probabilities(rows)
        gains = [part[:-1] - part[-1] for part in means.split([count + 1 for count in counts])]
        return torch.cat(gains).clamp(0, 1)

    @torch.no_grad()
    def _rewards_after_images(
        self, answer: Sequence[str], trainer: Any, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Return what `_rewards` does, by TRL's own forward."""
        own = self.objective == "rlpr"
        scored = [answer_rows(rollout, own=own) for rollout in self.rollouts]
        rows = image_rows(trainer, trainer.model, scored, inputs)
        if not own:
            return answer_value(rows, self.objective)
        plain = [
            replace(self.join(rollout.prompt_ids, Sample([]), known), plain=True)
            for rollout, known in zip(self.rollouts, answer, strict=True)
        ]
        without = image_rows(trainer, trainer.model, plain, inputs)
        return (_mean_probabilities(rows) - _mean_probabilities(without)).clamp(0, 1)


def answer_rows(rollout: Rollout, *, own: bool = False) -> Rollout:
    """Return a rollout that has head rows for its answer alone; `own`: for the own tokens alone."""
    if own:
        return replace(rollout, plain=True)
    return replace(rollout, plain=True, own_start=0, own_end=None)


def answer_value(rows: Sequence[Tensor], objective: str) -> Tensor:
    """Return log π(y|x⊕z), or for verifree π(y|x⊕z), from each answer's log-probs; fp64 [S]."""
    logp = torch.stack([r.double().sum() for r in rows])
    return logp.exp() if objective == "verifree" else logp


def _mean_probabilities(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([r.double().exp().sum() / max(1, len(r)) for r in rows])

"""What a chat template puts around a prompt, and whether the model thinks before it answers.

Some models write their thoughts in a block of their own, and the answer behind it:

    <think>
    2 + 3 = 5, so it must be 5.
    </think>

    The answer is 5<|im_end|>

Then the rationale is what stands in the block, and `closing` ends it. Inside of it the words of an
answer template end nothing, since thoughts mention answers that they reject. The answer y is
`closing`, `behind`, the answer template and the known answer. Every prompt ends inside of the
block: where the template leaves it to the model to open one, `opening` is put behind the prompt.

Whether a model thinks is read off what its template renders, with the run's own arguments:

1. The generation prompt ends inside of a block: it thinks, and the block is open already.
2. The generation prompt ends behind an empty block: its thinking is switched off.
3. With `enable_thinking` false the template would write an empty block: it thinks.
4. The template puts an end of thoughts before an assistant's words: it thinks.
5. The run gives `enable_thinking` as true, and the template writes an assistant's thoughts: it
   thinks.

A model whose template shows none of this is taken as one that does not think. How its block is
written, with what white space, is read off an assistant's turn whose message brings thoughts; else
off the end of thoughts that rule 3 or 4 has found. A template that shows neither, as those that
drop all thoughts do, is taken to write the block as its family does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from latro.rollout.chat_template import (
    ASKED,
    SAID,
    TemplateRefusalError,
    arguments_of,
    render_each,
    template_of,
    tokenizer_name,
)
from latro.rollout.encoding import TextEncoder

_SWITCH = "enable_thinking"
_THOUGHT = "Jbmuvrekk"
# Where templates look for the thoughts of a message; transformers takes both for one.
_OF_THOUGHTS = ("reasoning_content", "thinking")
# What this package itself gives to the function that renders a template.
_GIVEN = {
    *("messages", "conversations", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask"),
}


@dataclass(frozen=True)
class Chat:
    """What a run gives to the chat template beside the messages of a prompt."""

    system_prompt: str | None = None
    """The content of a system message before the user's."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The template's own arguments, as `tokenizer.apply_chat_template` takes them."""


@dataclass(frozen=True)
class Thinking:
    """How a family of models marks its thoughts."""

    mark: str
    """What begins a block of thoughts."""
    opening: str
    """What is put behind a prompt so that the model thinks; "" where the template puts it there."""
    closing: str
    """What ends the thoughts."""
    before: str
    """What stands before `closing` where the thoughts do not end in white space."""
    behind: str
    """What stands between `closing` and the answer template."""


FAMILIES = (
    # Qwen3, SmolLM3, GLM, Nemotron, Kimi, QwQ, DeepSeek-R1 and what was distilled from it.
    Thinking(mark="<think>", opening="<think>\n", closing="</think>", before="\n", behind="\n\n"),
    # EXAONE Deep.
    Thinking(
        mark="<thought>", opening="<thought>\n", closing="</thought>", before="\n", behind="\n\n"
    ),
    # Gemma 4.
    Thinking(
        mark="<|channel>thought",
        opening="<|channel>thought\n",
        closing="<channel|>",
        before="\n",
        behind="",
    ),
    # Magistral.
    Thinking(mark="[THINK]", opening="[THINK]", closing="[/THINK]", before="", behind=""),
    # Seed-OSS.
    Thinking(
        mark="<seed:think>",
        opening="<seed:think>",
        closing="</seed:think>",
        before="",
        behind="\n",
    ),
    # gpt-oss: a message on the channel of analysis, and then one on the channel of answers.
    Thinking(
        mark="<|channel|>analysis<|message|>",
        opening="<|channel|>analysis<|message|>",
        closing="<|end|>",
        before="",
        behind="<|start|>assistant<|channel|>final<|message|>",
    ),
)


class Frame:
    """Puts prompts into a tokenizer's chat template.

    Args:
        tokenizer: any tokenizer.
        chat: what else the template is given; None: nothing.
        framed: whether prompts are put into the template; False: callers leave it out, and so its
            thoughts.

    Attributes:
        encoder: encodes text for this tokenizer.
        thinking: how the model marks its thoughts; None: it does not think.
        ending: how the template ends a prompt; "" where there is none, or it does not show.
        joint: the white space between a prompt and the assistant's words that follow; None where it
            is not known, or thoughts follow.

    Raises:
        ValueError: `chat` asks for something that the tokenizer's template cannot do; or the
            template exceeds the limits of `latro.rollout.chat_template.render`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: Chat | None = None, *, framed: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat or Chat()
        self.encoder = TextEncoder(tokenizer)
        self.thinking: Thinking | None = None
        self.ending = ""
        self.joint: str | None = None
        # How every prompt ends; None where the template knows no thoughts.
        self._ending: str | None = None
        self._check_arguments()
        if tokenizer.chat_template and framed:
            self._check_system_prompt()
            self._find_thinking()
            if self.thinking is None:
                self._find_joint()

    def messages(self, prompt: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Return a prompt as messages, with the run's system prompt in front.

        Raises:
            ValueError: it has a system message of its own beside the run's.
        """
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # Arrow gives every message the keys of all messages, with None where a message lacks one,
        # which a template may take for content.
        messages = [{k: v for k, v in message.items() if v is not None} for message in own]
        if self.chat.system_prompt is None:
            return messages
        if any(message["role"] == "system" for message in messages):
            raise ValueError(
                "system_prompt: expected prompts without a system message of their own beside it, "
                f"got one of {len(messages)} messages that has one"
            )
        return [{"role": "system", "content": self.chat.system_prompt}, *messages]

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a prompt's messages, up to where the model goes on.

        Raises:
            ValueError: the template refuses the messages, exceeds its limits, or has the model
                think here and not in other prompts, or the other way round.
        """
        return self.rendered_each([messages])[0]

    def rendered_each(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
        """Return what `rendered` does for each of several prompts; it raises where any does."""
        texts = self._render_each(conversations, add_generation_prompt=True)
        return [self._to_go_on(text) for text in texts]

    def _to_go_on(self, text: str) -> str:
        if self._ending is not None and not text.endswith(self._ending):
            raise ValueError(
                f"the chat template of {tokenizer_name(self.tokenizer)} ends this prompt with "
                f"{text[-len(self._ending) :]!r}, and others with {self._ending!r}; whether the "
                "model thinks must be the same for all prompts: switch it by chat_template_kwargs "
                "or system_prompt"
            )
        return text + (self.thinking.opening if self.thinking else "")

    def _render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, **switch: Any
    ) -> str:
        given = {"add_generation_prompt": add_generation_prompt, **switch}
        return self._render_each([messages], **given)[0]

    def _render_each(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        add_generation_prompt: bool,
        **switch: Any,
    ) -> list[str]:
        return render_each(
            self.tokenizer,
            conversations,
            add_generation_prompt=add_generation_prompt,
            template_kwargs={**self.chat.template_kwargs, **switch},
        )

    def _check_arguments(self) -> None:
        given = [
            name
            for name, value in (
                ("system_prompt", self.chat.system_prompt),
                ("chat_template_kwargs", self.chat.template_kwargs),
            )
            if value
        ]
        if not self.tokenizer.chat_template:
            if given:
                raise ValueError(
                    f"{given[0]}: expected a tokenizer with a chat template, got "
                    f"{tokenizer_name(self.tokenizer)}, which has none"
                )
            return
        names = self.chat.template_kwargs
        # A name that the template sets by itself, or does not read, would change nothing, and
        # nobody would know.
        read = arguments_of(self.tokenizer, names) if names else []
        for name, value in names.items():
            if name in _GIVEN or name in self.tokenizer.special_tokens_map:
                raise ValueError(
                    f"chat_template_kwargs: expected the template's own arguments, got {name!r}, "
                    "which it is given in any case"
                )
            if name not in read:
                raise ValueError(
                    f"chat_template_kwargs: the chat template of {tokenizer_name(self.tokenizer)} "
                    f"does not read {name!r}"
                )
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"chat_template_kwargs: expected a JSON value at {name!r}, such as the schema "
                    f"of a tool (transformers.utils.get_json_schema), got {value!r}"
                ) from error

    def _check_system_prompt(self) -> None:
        if self.chat.system_prompt is None:
            return
        instead = "put it into the prompts"
        try:
            rendered = {
                self._render(
                    [{"role": "system", "content": text}, {"role": "user", "content": ASKED}],
                    add_generation_prompt=True,
                )
                for text in (self.chat.system_prompt, SAID)
            }
        except TemplateRefusalError as error:
            raise ValueError(f"system_prompt: {error}; {instead}") from error
        if len(rendered) == 1:
            raise ValueError(
                f"system_prompt: the chat template of {tokenizer_name(self.tokenizer)} leaves "
                f"system messages out; {instead}"
            )

    def _find_thinking(self) -> None:
        """Set `thinking` and `_ending` by what the template renders."""
        question = self.messages(ASKED)
        try:
            ending = self._render(question, add_generation_prompt=True).rpartition(ASKED)[2]
        except ValueError:
            # What is wrong shows with the prompts, whose row is then named.
            return
        for family in FAMILIES:
            opened, closed = _marks(family, ending)
            written = self._written(family, ending)
            if opened > closed:
                shown = written or self._before_words(family) or family
                self.thinking = replace(shown, opening="")
            elif closed < 0:
                asked = written if self.chat.template_kwargs.get(_SWITCH) is True else None
                shows = self._switched(family) or self._before_words(family) or asked
                self.thinking = shows and (written or shows)
            if self.thinking or closed >= 0:
                self._ending = ending
                return

    def _find_joint(self) -> None:
        """Set `ending`, and `joint` where the template shows it before an assistant's words."""
        question = self.messages(ASKED)
        turn = {"role": "assistant", "content": SAID}
        try:
            prompt = self.rendered(question)
            text = self._render([*question, turn], add_generation_prompt=False)
        except ValueError:
            return
        self.ending = prompt.rpartition(ASKED)[2]
        before, said, _ = text.partition(SAID)
        if said and before.startswith(prompt) and not before[len(prompt) :].strip():
            self.joint = before[len(prompt) :]
        elif self._ending is not None:
            # Words begin at once behind an empty block that only prompts have.
            self.joint = ""

    def _switched(self, family: Thinking) -> Thinking | None:
        """Return the family where the template writes its empty block to switch thinking off."""
        ending = self._ending_without_thoughts
        opened, closed = _marks(family, ending)
        if not 0 <= opened < closed:
            return None
        return replace(family, behind=ending.rpartition(family.closing)[2])

    def _before_words(self, family: Thinking) -> Thinking | None:
        """Return the family where the template puts an end of thoughts before words."""
        before = self._turn_of_words.partition(SAID)[0]
        behind = before[len(before.rstrip()) :]
        ended = before.rstrip().endswith(family.closing + family.behind.rstrip())
        return replace(family, behind=family.behind.rstrip() + behind) if ended else None

    def _written(self, family: Thinking, ending: str) -> Thinking | None:
        """Return the family as the template writes thoughts that a message brings.

        `ending` is what a prompt ends with.
        """
        before, thought, rest = self._turn_with_thoughts.partition(_THOUGHT)
        closing, said, _ = rest.partition(SAID)
        space, closed, behind = closing.partition(family.closing)
        if not (thought and said and closed) or space.strip():
            return None
        if behind.strip() != family.behind.strip():
            return None
        opening = before.removeprefix(ending)
        if opening.strip() != family.mark:
            opening = family.opening
        return replace(family, opening=opening, before=space, behind=behind)

    # What does not depend on the family is rendered once for all of them.

    @cached_property
    def _ending_without_thoughts(self) -> str:
        """What a prompt ends with where thinking is switched off; "": there is no such switch."""
        if _SWITCH not in template_of(self.tokenizer, self.chat.template_kwargs):
            return ""
        question = self.messages(ASKED)
        try:
            text = self._render(question, add_generation_prompt=True, **{_SWITCH: False})
        except TemplateRefusalError:
            return ""
        return text.rpartition(ASKED)[2]

    @cached_property
    def _turn_of_words(self) -> str:
        return self._turn()

    @cached_property
    def _turn_with_thoughts(self) -> str:
        return self._turn(**dict.fromkeys(_OF_THOUGHTS, _THOUGHT))

    def _turn(self, **thoughts: str) -> str:
        """Return the text behind a user's words that has an assistant's turn; "": it is refused."""
        turn = {"role": "assistant", "content": SAID, **thoughts}
        try:
            text = self._render([*self.messages(ASKED), turn], add_generation_prompt=False)
        except TemplateRefusalError:
            return ""
        return text.rpartition(ASKED)[2]


def _marks(family: Thinking, text: str) -> tuple[int, int]:
    """Return where a text opens a block of thoughts last, and where it closes one; −1: nowhere."""
    # gpt-oss ends other messages as it ends thoughts.
    closing = family.closing + family.behind.strip()
    return text.rfind(family.mark), text.rfind(closing)

"""The arguments of the data: a task and its problems, and how their prompts are framed."""

from __future__ import annotations

from dataclasses import dataclass, field

from latro.config.fields import check_settings, json_object, setting
from latro.rollout.frame import Chat
from latro.tasks import FORMATS, GRADERS, TASKS


@dataclass
class DataArguments:
    """The problems to train or evaluate on.

    Raises:
        ValueError: the answer template is empty, or begins or ends with white space; the system
            prompt is empty; or the chat template's arguments are no JSON object.
    """

    _argument_group_name = "data"

    dataset_name: str = setting(
        "arithmetic",
        f"A task: {', '.join(sorted(TASKS))}. Or data of your own: a file ({', '.join(FORMATS)}), "
        "a folder with one file per split, or a hub id.",
    )
    dataset_config: str | None = setting(
        None, "Configuration of your own data on the hub, where it has several."
    )
    dataset_path: str | None = setting(
        None, "A folder with a task's raw files; without it they come from the hub."
    )
    num_train_examples: int | None = setting(None, "Number of training problems; without it, all.")
    answer_template: str | None = setting(
        None, 'The words before a stated answer; without it "The answer is".'
    )
    system_prompt: str | None = setting(
        None, "A system message before every prompt, for models with a chat template."
    )
    # Text becomes a mapping below.
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
        },
    )
    grader: str | None = setting(
        None,
        "How your own data is graded; without it: choice where there are choices, number where "
        "all answers are numbers, else exact.",
        choices=list(GRADERS),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        template = self.answer_template
        if template is not None and (not template or template != template.strip()):
            raise ValueError(
                f"answer_template: expected words without white space around them, got {template!r}"
            )
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ValueError(f"system_prompt: expected words, got {self.system_prompt!r}")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_object(
                "chat_template_kwargs", self.chat_template_kwargs
            )

    @property
    def chat(self) -> Chat:
        """Return what chat templates are given beside a problem's prompt."""
        assert not isinstance(self.chat_template_kwargs, str)
        return Chat(self.system_prompt, self.chat_template_kwargs or {})

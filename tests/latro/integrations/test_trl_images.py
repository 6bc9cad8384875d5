"""`AnswerLikelihood` and `AnswerGradient` after prompts with images, on a small Llava."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BatchFeature,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
image = pytest.importorskip("PIL.Image", reason="needs Pillow")

from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

from latro.integrations.trl import AnswerGradient, AnswerLikelihood  # noqa: E402
from latro.rollout.sequences import Rollout, Sample  # noqa: E402

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
ROWS = [
    {"prompt": [{"role": "user", "content": "How many red pens?"}], "answer": "7", "color": "red"},
    {"prompt": [{"role": "user", "content": "Pens?"}], "answer": "15", "color": "blue"},
]


@pytest.fixture
def processor(padding_tokenizer: Any) -> LlavaProcessor:
    tokenizer = copy.deepcopy(padding_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    size = {"height": 8, "width": 8}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def llava(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(
        hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4, **sizes
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **sizes,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


@pytest.fixture
def make(
    make_trl: Callable[..., Any], llava: Any, processor: LlavaProcessor
) -> Callable[..., tuple[Any, AnswerLikelihood]]:
    """Return `make(kind, completions, **settings)`, a trainer and its reward."""

    def build(kind: type, completions: list[list[int]], **settings: Any) -> Any:
        objective = settings.pop("objective", "latro")
        reward = AnswerLikelihood(llava, processor.tokenizer, objective=objective)
        rows = [{**row, "image": image.new("RGB", (8, 8), row["color"])} for row in ROWS]
        trainer = make_trl(
            kind, llava, reward, completions, rows=rows, tokenizer=processor, **settings
        )
        return trainer, reward

    return build


def answer_logp(model: Any, processor: LlavaProcessor, rollout: Rollout, color: str) -> Tensor:
    """Return the log-probs of an answer's tokens, by one forward of its sequence alone."""
    pixels = processor.image_processor(image.new("RGB", (8, 8), color), return_tensors="pt")
    ids = rollout.prompt_ids + rollout.rationale_ids + rollout.answer_ids
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels["pixel_values"]).logits[0]
    target = torch.tensor(rollout.answer_ids)
    log_p = (logits[-len(target) - 1 : -1] / 0.7).log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0]


COMPLETIONS = [[20, 21, 22, 0], [23, 0], [24, 25, 0], [0], [26, 0], [27, 28, 29, 0], [30, 0], [0]]


@pytest.mark.parametrize("kind", [RLOOTrainer, GRPOTrainer])
@pytest.mark.parametrize("objective", ["latro", "verifree", "rlpr"])
def test_rewards_are_those_of_each_sequence_alone(
    make: Callable[..., Any], llava: Any, processor: LlavaProcessor, kind: type, objective: str
) -> None:
    given: dict[str, Any] = {}
    trainer, reward = make(kind, COMPLETIONS, objective=objective, temperature=0.7)
    own_calls = trainer._calculate_rewards

    def watched(*arguments: Any) -> Tensor:
        given["rewards"] = own_calls(*arguments)[:, 0]
        return given["rewards"][:, None]

    trainer._calculate_rewards = watched
    original = copy.deepcopy(llava.state_dict())
    trainer.train()
    llava.load_state_dict(original)
    llava.eval()
    expected = []
    with torch.no_grad():
        for index, rollout in enumerate(reward.rollouts):
            row = ROWS[index // 4]
            logp = answer_logp(llava, processor, rollout, row["color"])
            if objective != "rlpr":
                expected.append(logp.sum().exp() if objective == "verifree" else logp.sum())
                continue
            plain = reward.join(rollout.prompt_ids, Sample([]), row["answer"])
            without = answer_logp(llava, processor, plain, row["color"])[plain.own_rows]
            gain = logp[rollout.own_rows].exp().mean() - without.exp().mean()
            expected.append(gain.clamp(0, 1))
    torch.testing.assert_close(given["rewards"], torch.stack(expected))
    assert len(given["rewards"].unique()) > 4 - 2 * (objective == "rlpr")
    with torch.no_grad():
        red, blue = (
            answer_logp(llava, processor, reward.rollouts[0], color) for color in ("red", "blue")
        )
    assert (red - blue).abs().max() > 1e-3


def test_the_gradient_is_that_of_each_sequence_alone(
    make: Callable[..., Any], llava: Any, processor: LlavaProcessor
) -> None:
    """Completions are alike, so that they have no advantage; TRL shuffles them with the images."""

    class Both(AnswerGradient, RLOOTrainer):
        pass

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer, reward = make(Both, [[20, 21, 0]] * 8, temperature=0.7, **settings)
    before = copy.deepcopy(llava.state_dict())
    trainer.train()
    after = {name: p.detach().clone() for name, p in llava.named_parameters()}
    llava.load_state_dict(before)
    llava.zero_grad()
    for index, rollout in enumerate(reward.rollouts):
        color = ROWS[index // 4]["color"]
        (-answer_logp(llava, processor, rollout, color).sum() / 8).backward()
    moved = [(after[name] - p).abs().max() for name, p in llava.named_parameters()]
    assert max(moved) > 1e-2
    for name, p in llava.named_parameters():
        expected = p.detach() if p.grad is None else p.detach() - p.grad
        assert (after[name] - expected).abs().max() <= 1e-5 * max(moved), name


def with_images(count: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return rows and prompts as the trainer hands them to its reward functions."""
    pictures = [image.new("RGB", (8, 8), "red") for _ in range(count)]
    content = [[{"type": "image", "image": picture}] for picture in pictures]
    prompts = [[{"role": "user", "content": one}] for one in content]
    return [{"answer": "7", "image": picture} for picture in pictures], prompts


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("pixel_values", torch.zeros(16, 3, 8, 8), "got 16 pixel_values of 8 images"),
        ("input_ids", torch.ones(8, 4, dtype=torch.int64), "expected images in prompts without"),
    ],
)
def test_what_is_not_followed_is_refused(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: Tensor,
    word: str,
) -> None:
    """A processor cuts images into tiles, or makes other tokens where it is told of no tools."""
    trainer, _ = make(RLOOTrainer, COMPLETIONS)
    own = LlavaProcessor.__call__

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        # Not for the trainer, which makes the prompts' tokens with lists.
        return BatchFeature({**made, name: value}) if kwargs.get("return_tensors") == "pt" else made

    monkeypatch.setattr(LlavaProcessor, "__call__", other)
    inputs, prompts = with_images(8)
    with pytest.raises(NotImplementedError, match=word):
        trainer._calculate_rewards(inputs, prompts, [""] * 8, COMPLETIONS)

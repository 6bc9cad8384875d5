"""`SharedPrefix`: TRL's log-probs and updates, with every prompt once through the trunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from latro.config.training import SMALL_MODEL
from latro.model.scoring import Scorer

trl = pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

from peft import LoraConfig  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from latro.integrations.trl import AnswerGradient, AnswerLikelihood, SharedPrefix  # noqa: E402

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


class PackedRLOO(SharedPrefix, RLOOTrainer):
    pass


class PackedGRPO(SharedPrefix, GRPOTrainer):
    pass


KINDS = [(PackedRLOO, RLOOTrainer), (PackedGRPO, GRPOTrainer)]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def batch() -> tuple[Tensor, Tensor, int]:
    """Return ids and mask of two prompts of three completions each, out of order; one is masked."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    ids = torch.randint(1, 390, (6, 5 + 7), generator=generator)
    mask = torch.zeros_like(ids)
    for row, (which, length) in enumerate([(0, 7), (1, 3), (1, 7), (0, 1), (0, 0), (1, 4)]):
        prompt = prompts[which]
        ids[row, 5 - len(prompt) : 5] = torch.tensor(prompt)
        mask[row, 5 - len(prompt) : 5 + length] = 1
    return ids, mask, 7


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_scores_are_trls(
    small_model: Any, make_trl: Callable[..., Any], kind: Any, theirs: Any, batch_size: int | None
) -> None:
    trainer = make_trl(kind, small_model, lengths, beta=0.1, temperature=0.7)
    with torch.no_grad():
        # So that the reference is not the policy.
        small_model.get_output_embeddings().weight.mul_(1.5)
    for model in (trainer.model, trainer.ref_model):
        arguments = (model, *batch(), batch_size)
        logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
            *arguments, compute_entropy=True
        )
        expected = theirs._get_per_token_logps_and_entropies(
            trainer, *arguments, compute_entropy=model is trainer.model
        )
        torch.testing.assert_close(logps, expected[0])
        if model is trainer.model:
            torch.testing.assert_close(entropies, expected[1])
        assert aux_loss is None
        assert trainer._get_per_token_logps_and_entropies(*arguments)[1] is None
        assert logps.min() < -5
        assert (logps[4] == 0).all()


def update(
    make_trl: Callable[..., Any], kind: Any, completions: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Return all trained weights, before and after an update."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    options = {"peft_config": settings.pop("peft_config")} if "peft_config" in settings else {}
    trainer = make_trl(kind, model, lengths, completions, options=options, **settings)

    def weights() -> Tensor:
        trained = (p for p in trainer.model.parameters() if p.requires_grad)
        return torch.cat([p.detach().flatten() for p in trained]).double()

    before = weights()
    trainer.train()
    return before, weights()


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "gradient_checkpointing": True},
        {"beta": 0.1, "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])},
        # A rate at which TRL's own RLOO does not diverge within the four updates.
        {"num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
        | {"learning_rate": 1e-4}
        | {"per_device_train_batch_size": 4, "mask_truncated_completions": True},
    ],
    ids=["reference", "adapter", "iterations"],
)
@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_an_update_is_trls(
    make_trl: Callable[..., Any],
    completions: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    theirs: Any,
    settings: dict[str, Any],
) -> None:
    """The weights differ by no more than TRL's own do where its tiles have another width."""
    settings = {"learning_rate": 0.01, **settings}
    ids = completions(unfinished=True)
    before, expected = update(make_trl, theirs, ids, **settings)
    with monkeypatch.context() as narrow:
        narrow.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
        noise = (update(make_trl, theirs, ids, **settings)[1] - expected).abs().max()
    ours = update(make_trl, kind, ids, **settings)[1]
    moved = (expected - before).abs().max()
    assert moved > 1e-6
    assert (ours - expected).abs().max() <= 2 * noise + 1e-5 * moved


def test_a_bonus_for_entropy_has_its_gradient(
    make_trl: Callable[..., Any], completions: Callable[..., Any]
) -> None:
    ids = completions(unfinished=True)
    settings = {"learning_rate": 0.01, "entropy_coef": 0.5}
    before, expected = update(make_trl, GRPOTrainer, ids, **settings)
    without = update(make_trl, GRPOTrainer, ids, learning_rate=0.01)[1]
    ours = update(make_trl, PackedGRPO, ids, **settings)[1]
    of_bonus = (expected - without).abs().max()
    assert of_bonus > 0.1 * (expected - before).abs().max()
    assert (ours - expected).abs().max() < 1e-3 * of_bonus


def test_all_three_together_train(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    class Together(AnswerGradient, SharedPrefix, RLOOTrainer):
        pass

    before = small_model.get_input_embeddings().weight.detach().clone()
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    trainer = make_trl(Together, small_model, [reward, lengths], beta=0.1, max_steps=2, bf16=True)
    trainer.train()
    assert not torch.equal(small_model.get_input_embeddings().weight, before)


# What is refused.


def test_a_model_that_cannot_share_a_prefix_is_refused(
    small_model: Any, make_trl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "_why_not_packed", lambda self: "its layers carry a state")
    with pytest.raises(ValueError, match="expected one whose sequences can share a prefix, got"):
        make_trl(PackedRLOO, small_model, lengths)


def test_weights_in_shards_are_refused(
    small_model: Any, make_trl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latro.integrations.trl.shared_prefix.is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="got an engine that shards them; train by DDP or ZeRO-2"):
        make_trl(PackedRLOO, small_model, lengths)


def test_images_are_refused(small_model: Any, make_trl: Callable[..., Any]) -> None:
    trainer = make_trl(PackedRLOO, small_model, lengths)
    with pytest.raises(NotImplementedError, match="got prompts with image_sizes, pixel_values"):
        trainer._get_per_token_logps_and_entropies(
            small_model, *batch(), pixel_values=torch.ones(1), image_sizes=torch.ones(1)
        )


def test_a_head_in_fp32_is_refused(small_model: Any, make_trl: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: expected none with SharedPrefix"):
        make_trl(PackedGRPO, small_model, lengths, cast_lm_head_to_fp32=True)


def test_a_seam_that_moved_is_refused(
    small_model: Any, make_trl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RLOOTrainer, "_get_per_token_logps_and_entropies", lambda self, model: None)
    word = rf"TRL {trl.__version__} has another RLOOTrainer .* got \(self model\)"
    with pytest.raises(RuntimeError, match=word):
        make_trl(PackedRLOO, small_model, lengths)

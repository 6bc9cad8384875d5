"""`AnswerLikelihood` and `AnswerGradient`: latro's rewards and update, in TRL's trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from latro import LatroConfig, LatroTrainer
from latro.model.packing import group_layout, plain_offsets
from latro.model.scoring import Scorer
from latro.objectives import OBJECTIVES, ObjectiveSettings, Rows
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample, eos_token_ids
from tests.latro.conftest import Sums
from tests.latro.integrations.conftest import EXAMPLES
from tests.latro.thinking_frames import QWEN3

trl = pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

from peft import LoraConfig, get_peft_model  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

from latro.integrations.trl import AnswerGradient, AnswerLikelihood  # noqa: E402

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


class LikelihoodRLOO(AnswerGradient, RLOOTrainer):
    pass


class LikelihoodGRPO(AnswerGradient, GRPOTrainer):
    pass


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def rewards_of(reward: AnswerLikelihood, trainer: Any, completions: list[list[int]]) -> Tensor:
    """Return what the trainer gets of its reward function, without an update."""
    inputs = [example for example in EXAMPLES for _ in range(4)]
    prompts = [example["prompt"] for example in inputs]
    texts = trainer._tokenizer.batch_decode(completions, skip_special_tokens=True)
    return trainer._calculate_rewards(inputs, prompts, texts, completions)[:, 0]


def own_rewards(
    model: Any, tokenizer: Any, completions: list[list[int]], temperature: float, **settings: Any
) -> Tensor:
    """Return latro's rewards, from one forward over rationales, answers and plain answers."""
    objective = settings.pop("objective")
    join = AnswerJoin(tokenizer, "The answer is", eos_token_ids(model, tokenizer))
    groups = []
    for index, example in enumerate(EXAMPLES):
        prompt = encode_prompt(tokenizer, example["prompt"])
        mine = completions[4 * index : 4 * index + 4]
        group = [join(prompt, Sample(ids), example["answer"]) for ids in mine]
        plain = join(prompt, Sample([]), example["answer"])
        groups.append([*group, replace(plain, plain=True)])
    scorer = Scorer(model, temperature=temperature)
    batch = scorer.collate(groups)
    with torch.no_grad():
        logp = scorer(batch).logp
    rows = Rows(logp[: batch.num_rows], group_layout([batch], 4, 2), own_answer=batch.own_answer)
    if objective == "rlpr":
        rows = replace(
            rows, plain_logp=logp[batch.num_rows :], plain_offsets=plain_offsets([batch])
        )
    return OBJECTIVES[objective](rows, ObjectiveSettings(beta=0.0, **settings)).reward


@pytest.mark.parametrize("kind", [RLOOTrainer, GRPOTrainer])
@pytest.mark.parametrize("objective", ["latro", "verifree", "rlpr"])
def test_rewards_are_latros_own(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
    kind: type,
    objective: str,
) -> None:
    ids = completions(unfinished=True)
    reward = AnswerLikelihood(small_model, padding_tokenizer, objective=objective)
    trainer = make_trl(kind, small_model, reward, ids, temperature=0.7)
    ours = rewards_of(reward, trainer, ids)
    expected = own_rewards(small_model, padding_tokenizer, ids, 0.7, objective=objective)
    torch.testing.assert_close(ours, expected)
    # Unfinished ones have the lowest of their group.
    assert ours[1] == ours[:4].min()
    assert ours[6] == ours[4:].min()
    assert len(ours.unique()) > 2


def test_what_is_excluded_has_no_reward(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
) -> None:
    ids = completions(unfinished=True)
    reward = AnswerLikelihood(small_model, padding_tokenizer, unfinished="exclude")
    rewards = rewards_of(reward, make_trl(RLOOTrainer, small_model, reward, ids), ids)
    assert rewards.isnan().nonzero().flatten().tolist() == [1, 6]


def test_beside_other_rewards_nothing_is_excluded(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
) -> None:
    """TRL sums the rewards that there are, in which a missing log-likelihood would count as 0."""
    ids = completions(unfinished=True)
    reward = AnswerLikelihood(small_model, padding_tokenizer, unfinished="exclude")

    def other(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = make_trl(GRPOTrainer, small_model, [reward, other], ids)
    with pytest.raises(ValueError, match="unfinished: expected 'floor' where the trainer has"):
        trainer.train()


def test_the_answer_stands_in_the_place_of_what_a_completion_states(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    texts = [" 7 + 15 = 22.", " 7 + 15 = 22. The answer is 3."] * 4
    ids = [[*padding_tokenizer.encode(t), padding_tokenizer.eos_token_id] for t in texts]
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    rewards = rewards_of(reward, make_trl(RLOOTrainer, small_model, reward, ids), ids)
    torch.testing.assert_close(rewards[0::2], rewards[1::2])
    assert "3." not in padding_tokenizer.decode(reward.rollouts[1].input_ids)


def test_padding_at_the_end_tells_that_a_stop_string_ended_a_completion(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    tokenizer = copy.deepcopy(padding_tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    reward = AnswerLikelihood(small_model, tokenizer)
    ids = [[20, 21, 5, 5], [20, 21]] * 4
    rewards_of(reward, make_trl(RLOOTrainer, small_model, reward, ids), ids)
    assert [rollout.finished for rollout in reward.rollouts] == [True, False] * 4
    assert all(rollout.rationale_ids == [20, 21] for rollout in reward.rollouts)


def test_chats_are_read_as_the_trainer_reads_them(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    """A template's arguments, which the reward is not told, change the prompt."""
    tokenizer = copy.deepcopy(padding_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        + tokenizer.eos_token
        + "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{{ mood }}{% endif %}"
    )
    rows = [
        {"prompt": [{"role": "user", "content": e["prompt"]}], "answer": e["answer"]}
        for e in EXAMPLES
    ]
    reward = AnswerLikelihood(small_model, tokenizer)
    settings = {"chat_template_kwargs": {"mood": " gladly,"}, "max_completion_length": 4}
    trainer = make_trl(
        LikelihoodGRPO, small_model, reward, rows=rows, tokenizer=tokenizer, **settings
    )
    trainer.train()
    for rollout in reward.rollouts:
        text = tokenizer.decode(rollout.prompt_ids)
        assert text.startswith("user: Tom has") or text.startswith("user: Ann has")
        assert text.endswith("assistant: gladly,")


@pytest.mark.parametrize(
    ("framed", "arguments", "thinks"),
    [
        (True, {}, True),
        (True, {"enable_thinking": False}, False),
        (False, {}, False),
        (False, {"enable_thinking": False}, False),
    ],
)
def test_answers_follow_thoughts_where_the_trainers_prompts_ask_for_some(
    small_model: Any,
    padding_tokenizer: Any,
    make_trl: Callable[..., Any],
    framed: bool,
    arguments: dict[str, Any],
    thinks: bool,
) -> None:
    tokenizer = copy.deepcopy(padding_tokenizer)
    tokenizer.chat_template = QWEN3
    rows = EXAMPLES
    if framed:
        rows = [{**e, "prompt": [{"role": "user", "content": e["prompt"]}]} for e in EXAMPLES]
    reward = AnswerLikelihood(small_model, tokenizer)
    settings = {"chat_template_kwargs": arguments, "max_completion_length": 4}
    make_trl(
        LikelihoodRLOO, small_model, reward, rows=rows, tokenizer=tokenizer, **settings
    ).train()
    for rollout in reward.rollouts:
        answer = tokenizer.decode(rollout.answer_ids)
        assert ("</think>" in answer) is thinks
        assert "The answer is" in answer


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def test_tools_are_part_of_the_prompt(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    tokenizer = copy.deepcopy(padding_tokenizer)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}, {% endfor %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    reward = AnswerLikelihood(small_model, tokenizer)
    trainer = make_trl(GRPOTrainer, small_model, reward, tokenizer=tokenizer)
    trainer.tools = [add]
    prompts = [[{"role": "user", "content": "Tom has 7."}]] * 4
    ids = [[20], [21], [22], [23]]
    reward(prompts=prompts, completion_ids=ids, answer=["7"] * 4, log_metric=trainer._log_metric)
    assert tokenizer.decode(reward.rollouts[0].prompt_ids) == "add, Tom has 7."


def latro_update(
    model: Any,
    ref_model: Any,
    tokenizer: Any,
    completions: list[list[int]],
    folder: Any,
    **settings: Any,
) -> Tensor:
    """Return the weights after one update of LatroTrainer's with given completions."""

    class Given:
        def generate(self, prompts: Any, **_: Any) -> Any:
            return [[Sample(ids) for ids in completions[4 * i : 4 * i + 4]] for i in (0, 1)]

        def update_weights(self, *_: Any) -> None: ...

    args = LatroConfig(
        output_dir=str(folder / "latro"),
        per_device_train_batch_size=2,
        num_generations=4,
        max_completion_length=16,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
        save_strategy="no",
        overwrite_output_dir=True,
        use_cpu=True,
        **settings,
    )
    dataset = Dataset.from_list(EXAMPLES)
    trainer = LatroTrainer(model, args, dataset, tokenizer, Sums(), ref_model=ref_model)
    trainer.engine = Given()
    # Completions are given by place, so that the order has to be the rows'.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(dataset)
    trainer.train()
    return flat(model)


@pytest.mark.parametrize(
    ("objective", "unfinished", "beta"),
    [
        ("latro", "floor", 0.1),
        ("latro", "floor", 0.0),
        ("latro", "exclude", 0.0),
        ("verifree", "floor", 0.1),
    ],
)
def test_an_update_of_rloo_is_latros(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
    tmp_path: Any,
    objective: str,
    unfinished: str,
    beta: float,
) -> None:
    """With β the completions are finished, since TRL subtracts the KL from floored rewards."""
    ids = completions(unfinished=beta == 0)
    initial = copy.deepcopy(small_model)
    with torch.no_grad():
        # So that π is not π_0, which TRL loads again.
        small_model.get_output_embeddings().weight.mul_(1.1)
    before = flat(small_model)
    settings = {"temperature": 0.7, "beta": beta}
    policy = copy.deepcopy(small_model)
    reward = AnswerLikelihood(policy, padding_tokenizer, objective=objective, unfinished=unfinished)
    make_trl(
        LikelihoodRLOO, policy, reward, ids, options={"answer_weight": 0.6}, **settings
    ).train()
    theirs = [
        latro_update(
            copy.deepcopy(small_model),
            copy.deepcopy(initial),
            padding_tokenizer,
            ids,
            tmp_path,
            objective=objective,
            unfinished=unfinished,
            answer_weight=0.6,
            token_budget=token_budget,
            **settings,
        )
        for token_budget in (16384, 30)
    ]
    moved = (theirs[0] - before).abs().max()
    noise = (theirs[1] - theirs[0]).abs().max()
    assert moved > 1e-3
    assert (flat(policy) - theirs[0]).abs().max() <= 2 * noise + 1e-5 * moved


@pytest.mark.parametrize("kind", [LikelihoodRLOO, LikelihoodGRPO])
def test_where_all_completions_are_alike_the_update_is_the_answers_gradient(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any], kind: type
) -> None:
    """Equal rewards have no advantage. TRL's two trainers scale accumulation steps apart."""
    ids = [[*padding_tokenizer.encode(" 9 pens."), padding_tokenizer.eos_token_id]] * 8
    expected = copy.deepcopy(small_model)
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    options = {"answer_weight": 0.6}
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trl(kind, small_model, reward, ids, options=options, **settings)
    before = flat(small_model)
    trainer.train()
    scorer = Scorer(expected)
    batch = scorer.collate([reward.rollouts[:4], reward.rollouts[4:]])
    answers = [torch.arange(a, b) for a, b in batch.offsets[1:].view(-1, 2).tolist()]
    (-0.6 / 8 * scorer(batch).logp[torch.cat(answers)].sum()).backward()
    torch.optim.SGD(expected.parameters(), lr=1.0).step()
    moved = (flat(expected) - before).abs().max()
    assert moved > 1e-2
    assert (flat(small_model) - flat(expected)).abs().max() <= 1e-5 * moved


@pytest.mark.parametrize("kind", [RLOOTrainer, GRPOTrainer])
def test_an_adapter_that_the_trainer_adds_is_part_of_the_policy(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
    kind: type,
) -> None:
    ids = completions(unfinished=False)
    plain = copy.deepcopy(small_model)
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    trainer = make_trl(kind, small_model, reward, ids, options={"peft_config": adapter}, beta=0.1)
    ours = rewards_of(reward, trainer, ids)
    adapted = get_peft_model(plain, adapter)
    adapted.load_state_dict(trainer.model.state_dict())
    merged = adapted.merge_and_unload()
    expected = own_rewards(merged, padding_tokenizer, ids, 1.0, objective="latro")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    with trainer.model.disable_adapter():
        assert (rewards_of(reward, trainer, ids) - ours).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [LikelihoodRLOO, LikelihoodGRPO])
def test_it_trains_with_trls_own_settings(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any], kind: type
) -> None:
    """TRL's default is bf16, gradient checkpoints and a loss by token."""
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    settings = {"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-3, "max_steps": 2}
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
    }
    held_out = {"eval_dataset": Dataset.from_list(EXAMPLES)}
    trainer = make_trl(kind, small_model, reward, options=held_out, beta=0.1, **settings)
    before = flat(small_model)
    trainer.train()
    log = trainer.state.log_history
    assert (flat(small_model) - before).abs().max() > 0
    assert any("rewards/AnswerLikelihood/mean" in entry for entry in log)
    assert any("eval_rewards/AnswerLikelihood/mean" in entry for entry in log)


# What is refused.


def test_bad_choices_are_refused(small_model: Any, padding_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="objective: expected one of latro, verifree, rlpr, got"):
        AnswerLikelihood(small_model, padding_tokenizer, objective="jepo")
    with pytest.raises(ValueError, match="unfinished: expected one of floor, exclude, got 'drop'"):
        AnswerLikelihood(small_model, padding_tokenizer, unfinished="drop")
    with pytest.raises(TypeError, match=r"tokenizer: expected a tokenizer, .* got str"):
        AnswerLikelihood(small_model, "a path")


def test_another_model_than_the_trainers_is_refused(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    reward = AnswerLikelihood(copy.deepcopy(small_model), padding_tokenizer)
    trainer = make_trl(RLOOTrainer, small_model, reward)
    with pytest.raises(ValueError, match="model: expected the LlamaForCausalLM that the trainer"):
        trainer.train()


def test_a_dataset_without_answers_is_refused(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    rows = [{"prompt": "Tom"}] * 2
    with pytest.raises(ValueError, match="dataset: expected a column answer"):
        make_trl(RLOOTrainer, small_model, reward, rows=rows).train()


@pytest.mark.parametrize("answer", [5, " "])
def test_an_answer_that_is_no_text_is_refused(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any], answer: Any
) -> None:
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    rows = [{"prompt": "Tom", "answer": answer}] * 2
    with pytest.raises(ValueError, match=f"non-empty string in the column .* got {answer!r}"):
        make_trl(RLOOTrainer, small_model, reward, rows=rows).train()


def test_a_rollout_function_is_refused(
    small_model: Any, padding_tokenizer: Any, make_trl: Callable[..., Any]
) -> None:
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    trainer = make_trl(GRPOTrainer, small_model, reward)
    trainer.rollout_func = lambda prompts, trainer: None
    with pytest.raises(NotImplementedError, match="rollout_func: expected none with"):
        rewards_of(reward, trainer, [[1]] * 8)


@pytest.mark.parametrize(
    ("objective", "count", "got"),
    [("rlpr", 1, r"\['rlpr'\]"), ("latro", 2, r"\['latro', 'latro'\]"), ("latro", 0, "len")],
)
def test_a_gradient_needs_one_likelihood(
    small_model: Any,
    padding_tokenizer: Any,
    make_trl: Callable[..., Any],
    objective: str,
    count: int,
    got: str,
) -> None:
    rewards = [AnswerLikelihood(small_model, padding_tokenizer, objective=objective)] * count
    with pytest.raises(ValueError, match=f"reward_funcs: expected one AnswerLikelihood.*{got}"):
        make_trl(LikelihoodRLOO, small_model, rewards or [len])


# The seam.


@pytest.mark.parametrize("kind", [LikelihoodRLOO, LikelihoodGRPO])
@pytest.mark.parametrize(
    ("method", "moved"),
    [
        ("_tokenize_prompts", lambda self, prompts, tools: None),
        ("_compute_loss", lambda self, model, inputs, scale: None),
        ("_generate_and_score_completions", None),
    ],
)
def test_a_seam_that_moved_is_refused(
    small_model: Any,
    padding_tokenizer: Any,
    completions: Callable[..., Any],
    make_trl: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    method: str,
    moved: Any,
) -> None:
    base = next(c for c in kind.__mro__ if c in (RLOOTrainer, GRPOTrainer))
    if moved is None:
        monkeypatch.delattr(base, method)
    else:
        monkeypatch.setattr(base, method, moved)
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    word = rf"TRL {trl.__version__} has another {base.__name__} than that of TRL 1.16.*{method}"
    with pytest.raises(RuntimeError, match=word):
        rewards_of(reward, make_trl(kind, small_model, reward), completions(unfinished=False))


def test_a_trainer_of_somebody_elses_is_refused(small_model: Any, padding_tokenizer: Any) -> None:
    reward = AnswerLikelihood(small_model, padding_tokenizer)
    arguments = {"prompts": ["Tom"], "completion_ids": [[1]], "answer": ["2"]}
    for log_metric in (lambda name, value: None, small_model.forward):
        with pytest.raises(TypeError, match="expected an RLOOTrainer or a GRPOTrainer of TRL's"):
            reward(**arguments, log_metric=log_metric)

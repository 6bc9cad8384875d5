from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from latro import LatroConfig, LatroTrainer
from latro.config.model import ModelArguments
from latro.engines.transformers import TransformersEngine
from latro.evaluate import evaluate
from latro.loading import load_model
from latro.model.adapters import head_parameters
from latro.model.initial import AdapterOff
from latro.model.scoring import Scorer
from latro.rollout.sequences import Rollout
from latro.train import train
from tests.latro.formula import formula_loss
from tests.latro.model.test_scoring import full_logits_logp

peft = pytest.importorskip("peft", reason="the package peft is not installed")

TRUNK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = {
    "frozen": {"target_modules": TRUNK},
    "adapted": {"target_modules": [*TRUNK, "lm_head"], "use_rslora": True},
    "whole": {"target_modules": TRUNK, "modules_to_save": ["lm_head"]},
}


def lora(**options):
    options = {"target_modules": TRUNK, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)


def adapted(model, **options):
    """Return a PeftModel whose adapter is not the nothing that it is at the start."""
    torch.manual_seed(3)
    return moved(peft.get_peft_model(model, lora(**options)))


def moved(model, far=0.3):
    """`model`, its adapter where training may have taken it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "modules_to_save" in name else far
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


@pytest.fixture
def make_trainer(tokenizer, task, dataset, tmp_path):
    """`make_trainer(model, peft_config=None, **settings)` on the toy task."""

    def make(model, peft_config=None, ref_model=None, **settings):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            **settings,
        }
        return LatroTrainer(
            model,
            LatroConfig(**settings),
            dataset,
            tokenizer,
            task,
            eval_dataset=dataset,
            ref_model=ref_model,
            peft_config=peft_config,
        )

    return make


def gradient_of(trainer, groups):
    trainer.rollout = lambda examples: groups
    trainer.training_step(trainer.model, {"examples": []})
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kl", ["reward", "k3", "exact"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("token_budget", [10**6, 1])
def test_gradients_equal_autograd_through_the_formula(
    make_trainer, tiny, rollouts, kl, head, token_budget
):
    base = tiny(seed=1).double()
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(10)
    initial = copy.deepcopy(base)
    model = peft.get_peft_model(base, lora(**HEADS[head]))
    settings = {"beta": 0.3, "answer_weight": 0.7, "kl": kl, "unfinished": "floor"}
    groups = rollouts(3, 4)
    trainer = make_trainer(model, backend="reference", token_budget=token_budget, **settings)
    moved(model)
    reference = copy.deepcopy(model)
    ours = gradient_of(trainer, groups)
    formula_loss(reference, initial, groups, **settings).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    assert ("base_model.model.lm_head.lora_A.default.weight" in ours) == (head == "adapted")
    for name, gradient in expected.items():
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        atol = 1e-6 * gradient.abs().max()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kl", ["reward", "exact"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (HEADS["frozen"], torch.float32),
        (HEADS["adapted"], torch.bfloat16),
        (HEADS["whole"], torch.bfloat16),
    ],
)
def test_kl_is_exactly_zero_at_the_start(make_trainer, tiny, kl, options, dtype):
    trainer = make_trainer(
        tiny().to(dtype), lora(**options), max_steps=2, kl=kl, lr_scheduler_type="constant"
    )
    assert isinstance(trainer.ref_scorer, AdapterOff)
    trainer.train()
    first, second = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert first == 0.0
    assert second != 0.0


@pytest.mark.parametrize("head", HEADS)
def test_with_its_adapter_off_it_is_the_initial_model(tiny, rollouts, head):
    base = tiny()
    initial = Scorer(copy.deepcopy(base))
    model = adapted(base, **HEADS[head])
    frozen_by_the_user = model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    )
    frozen_by_the_user.requires_grad_(False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    scorer = Scorer(model)
    batch = scorer.collate(rollouts(2, 4))
    before = scorer(batch).logp
    off = AdapterOff(scorer)
    assert torch.equal(off(batch).logp, initial(batch).logp)
    ours, theirs = off.reference(batch), initial.reference(batch)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.weight, theirs.weight)
    assert not torch.equal(before, off(batch).logp)
    assert torch.equal(before, scorer(batch).logp)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True},
        {"target_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("off", [False, True])
def test_the_heads_weight_is_what_its_forward_multiplies_with(tiny, options, tied, off):
    model = adapted(tiny(tie_word_embeddings=tied).double(), **options)
    head = model.get_base_model().get_output_embeddings()
    hidden = torch.randn(5, 32, dtype=torch.float64)
    upstream = torch.randn(5, head.weight.shape[0], dtype=torch.float64)
    trained = [p for p in head.parameters() if p.requires_grad]
    if off:
        model.base_model.disable_adapter_layers()
    expected = head(hidden)
    weight, bias = head_parameters(head)
    ours = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(ours, expected)
    if not off and trained:
        by_autograd = torch.autograd.grad(expected, trained, upstream)
        torch.testing.assert_close(torch.autograd.grad(ours, trained, upstream), by_autograd)
    else:
        assert not weight.requires_grad


def test_adapters_that_are_on_are_added_up(tiny):
    model = adapted(tiny().double(), target_modules=["lm_head"])
    model.add_adapter("second", lora(target_modules=["lm_head"], init_lora_weights=False))
    model.add_adapter("elsewhere", lora(target_modules=["q_proj"], init_lora_weights=False))
    head = model.get_base_model().get_output_embeddings()
    hidden = torch.randn(5, 32, dtype=torch.float64)
    for names in (["default"], ["default", "second", "elsewhere"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(hidden @ head_parameters(head)[0].T, head(hidden))
    model.merge_adapter()
    assert torch.equal(hidden @ head_parameters(head)[0].T, head(hidden))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora(target_modules=["lm_head"], use_dora=True), "on the head, got .*Dora"),
        (lambda: peft.LoHaConfig(target_modules=["lm_head"]), "without adapter, or with LoRA's"),
        (
            lambda: lora(trainable_token_indices={"lm_head": [1, 2]}),
            "without adapter, or with LoRA's",
        ),
    ],
)
def test_heads_that_are_no_one_weight_are_refused(make_trainer, tiny, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny(), config())


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_without_adapter_takes_the_frozen_form(make_trainer, tiny, rollouts, head):
    trainer = make_trainer(tiny(), lora(**HEADS[head]), kl="exact")
    groups = rollouts(2, 4)
    with _Calls() as calls:
        gradient_of(trainer, groups)
    ops = {name for name in calls.names if name.startswith("latro_kernels::linear_logprob_")}
    form = "frozen_backward" if head == "frozen" else "backward"
    assert ops == {f"latro_kernels::linear_logprob_{form}"}
    assert trainer.scorer.causal.get_parameter("model.embed_tokens.weight").grad is None
    assert head != "frozen" or trainer.scorer.causal.lm_head.weight.grad is None


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_packed_rows_equal_the_models_own_logits(tiny, rollouts, architecture):
    model = adapted(tiny(architecture), target_modules="all-linear")
    scorer = Scorer(model, temperature=0.7)
    assert scorer.packed
    groups = rollouts(2, 4)
    expected = full_logits_logp(model, [r for group in groups for r in group], 0.7)
    ours = scorer(scorer.collate(groups)).logp
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)


def test_rationales_are_sampled_with_the_adapter_on(tiny, tokenizer):
    model = adapted(tiny().double(), **HEADS["adapted"])
    merged = copy.deepcopy(model).merge_and_unload()
    # Kept by the engine: a config that cuts the distribution would otherwise show.
    model.get_base_model().generation_config.top_k = 1
    configs = model.generation_config, model.get_base_model().generation_config
    settings = {"num_samples": 3, "max_new_tokens": 12, "temperature": 1.0, "seeds": [5, 6]}
    prompts = [tokenizer.encode("Tom has 3 pens."), tokenizer.encode("How many?")]
    ours, plain = (
        TransformersEngine(m, tokenizer).generate(prompts, **settings) for m in (model, merged)
    )
    assert ours == plain
    with model.disable_adapter():
        assert TransformersEngine(model, tokenizer).generate(prompts, **settings) != plain
    assert configs == (model.generation_config, model.get_base_model().generation_config)
    assert model.get_base_model().generation_config.top_k == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_parameters": ["o_proj.weight"], "target_modules": ["q_proj"]},
    ],
    ids=["lora", "dora", "parameters"],
)
def test_what_is_sampled_is_scored_alike(tiny, tokenizer, options):
    """In fp32, where a decoding step on a CPU has linear layers of its own."""
    model = adapted(tiny(), **options).eval()
    prompt = tokenizer.encode("Tom has 3 pens.")
    ((sample,),) = TransformersEngine(model, tokenizer).generate(
        [prompt], num_samples=1, max_new_tokens=12, temperature=1.0, seeds=[5]
    )
    rollout = Rollout(prompt, sample.ids, [1], answer_start=len(sample.ids), finished=True)
    expected = full_logits_logp(model, [rollout], 1.0)[: len(sample.ids)]
    torch.testing.assert_close(
        torch.tensor(sample.logp, dtype=expected.dtype), expected, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(make_trainer, tiny, rollouts, reentrant):
    base = tiny()
    groups = rollouts(2, 4)
    plain = gradient_of(make_trainer(adapted(copy.deepcopy(base)), kl="exact"), groups)
    trainer = make_trainer(
        adapted(base),
        kl="exact",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    # Without it a reentrant checkpoint has no gradient; older transformers leave it to the trainer.
    assert trainer.model.get_input_embeddings()(torch.tensor([1])).requires_grad
    # As the Trainer does at the start of training.
    trainer.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradient_of(trainer, groups)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        assert torch.equal(checkpointed[name], gradient), name


def test_training_moves_the_adapter_alone_and_plain_peft_loads_it(
    make_trainer, tiny, rollouts, tmp_path
):
    base = tiny()
    before = copy.deepcopy(base.state_dict())
    trainer = make_trainer(
        base,
        lora(**HEADS["adapted"]),
        max_steps=30,
        lr_scheduler_type="constant",
        learning_rate=3e-2,
        activation_checkpointing=True,
    )
    trainer.train()
    rewards = [e["reward"] for e in trainer.state.log_history if "reward" in e]
    # Thirty steps of Adam on a handful of answers: far above any noise of sampling.
    assert rewards[-1] > rewards[0] + 5
    after = trainer.model.get_base_model().state_dict()
    frozen = {n.replace(".base_layer", ""): t for n, t in after.items() if "lora_" not in n}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.items())
    trainer.save_model()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "run"))
    groups = rollouts(1, 4)
    ours = trainer.scorer(trainer.scorer.collate(groups)).logp
    theirs = full_logits_logp(loaded, groups[0], 1.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head", ["adapted", "whole"])
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(make_trainer, tiny, tmp_path, head):
    straight = make_trainer(tiny(), lora(**HEADS[head]), save_strategy="steps", save_steps=2)
    straight.train()
    resumed = make_trainer(tiny(), lora(**HEADS[head]), output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    ends = [trainer.model.state_dict() for trainer in (straight, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def named(model, **adapters):
    """Return a PeftModel with moved adapters by their names, all of them on; q, v: their layers."""
    torch.manual_seed(3)
    names = list(adapters)
    first = lora(target_modules=adapters[names[0]])
    model = peft.get_peft_model(model, first, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(target_modules=adapters[name]))
    model.base_model.set_adapter(names)
    return moved(model)


ADAPTERS = {
    "one": ({"policy": ["q_proj"]}, ["policy"]),
    # Both have layers of the same shapes, so that one could take the other's place.
    "on a frozen one": ({"sft": ["q_proj"], "rl": ["o_proj"]}, ["rl"]),
    "two": ({"b": ["q_proj"], "a": ["o_proj"]}, ["a", "b"]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_with_names_are_resumed_as_they_were(make_trainer, tiny, tmp_path, case):
    def build():
        model = named(tiny(), **ADAPTERS[case][0])
        for name, parameter in model.named_parameters():
            if "lora_" in name and not any(f".{own}." in name for own in ADAPTERS[case][1]):
                parameter.requires_grad_(False)
        return model

    straight = make_trainer(build(), max_steps=2, save_strategy="steps", save_steps=1)
    straight.train()
    resumed = make_trainer(build(), max_steps=2, output_dir=str(tmp_path / "again"))
    trained = {n for n, p in resumed.model.named_parameters() if p.requires_grad}
    assert trained
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.model.active_adapters == list(ADAPTERS[case][0])
    assert {n for n, p in resumed.model.named_parameters() if p.requires_grad} == trained
    ends = [trainer.model.state_dict() for trainer in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_best_checkpoint_of_an_adapter_with_a_name_is_loaded(make_trainer, tiny, monkeypatch):
    model = named(tiny(), policy=["q_proj"])
    trainer = make_trainer(
        model,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    weights = {}

    def evaluate(*args, **kwargs):
        step = trainer.state.global_step
        weights[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
        metrics = {"eval_accuracy_greedy": 1.0 if step == 1 else 0.0}
        trainer.log(metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    best, last = weights[1], weights[2]
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert all(torch.equal(p, best[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3]}},
    ],
)
def test_a_run_saves_all_rows_of_a_resized_vocabulary(
    make_trainer, tiny, tokenizer, tmp_path, options, tied
):
    tokens = options.get("trainable_token_indices")
    if tied and tokens:
        pytest.skip("PEFT saves neither layer")
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer) + 7)
    trainer = make_trainer(model, lora(**options), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "run")
    args = ModelArguments(model_name_or_path=str(tmp_path / "run"))
    given, found = (m.state_dict() for m in (trainer.model, load_model(args)[0]))
    assert given.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_the_seed_decides_the_adapter(make_trainer, tiny):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    one, same, other = (
        make_trainer(tiny(), lora(), seed=seed).model.get_parameter(name) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


SMALL = (
    *("--dataset_name", "arithmetic", "--num_train_examples", "16", "--num_eval_examples", "4"),
    *("--num_generations", "2", "--max_completion_length", "8", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "true"),
    *("--max_steps", "2", "--save_strategy", "no"),
)


@pytest.fixture
def model_dir(tiny, tokenizer, tmp_path):
    path = tmp_path / "model"
    tiny().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def evaluation(model, tmp_path):
    return evaluate(
        [
            *("--model_name_or_path", str(model), "--dataset_name", "arithmetic"),
            *("--num_eval_examples", "4", "--eval_split", "validation", "--num_samples", "2"),
            *("--majority", "2", "--max_completion_length", "8"),
            *("--output", str(tmp_path / f"{model.name}.json")),
        ]
    )["metrics"]


def test_the_commands(model_dir, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    results = train(
        [
            *("--model_name_or_path", str(model_dir), "--output_dir", str(run), *SMALL),
            *("--use_peft", "true", "--lora_r", "8", "--lora_target_modules", "all-linear"),
        ]
    )
    assert results["final"]["eval_answer_logp"] != results["base"]["eval_answer_logp"]
    config = peft.PeftConfig.from_pretrained(str(run))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (8, 32, str(model_dir))
    trained, base = evaluation(run, tmp_path), evaluation(model_dir, tmp_path)
    assert trained["answer_logp"] != base["answer_logp"]
    # An adapter is trained on, and needs no tokenizer of its own.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / name).unlink()
    results = train(["--model_name_or_path", str(run), "--output_dir", str(again), *SMALL])
    assert (again / "adapter_model.safetensors").is_file()
    assert evaluation(again, tmp_path)["answer_logp"] != trained["answer_logp"]
    with pytest.raises(ValueError, match="peft_config: expected a model without adapter"):
        train(
            [
                *("--model_name_or_path", str(run), "--output_dir", str(tmp_path / "third")),
                *(*SMALL, "--use_peft", "true"),
            ]
        )


def test_a_pickled_adapter_is_refused(model_dir, tmp_path):
    model = peft.get_peft_model(tiny_of(model_dir), lora())
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(ValueError, match=r"cannot load .* adapter_model\.safetensors"):
        evaluation(tmp_path / "adapter", tmp_path)


def tiny_of(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_without_the_package(make_trainer, tiny, model_dir, tmp_path, monkeypatch):
    peft.get_peft_model(tiny_of(model_dir), lora()).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("latro.model.adapters.is_peft_available", lambda: False)
    message = r"needs the package peft.*pip install 'latro-kernels\[peft\]'"
    with pytest.raises(ValueError, match=f"use_peft: {message}"):
        train(["--model_name_or_path", str(model_dir), *SMALL, "--use_peft", "true"])
    with pytest.raises(ValueError, match=f"peft_config: {message}"):
        make_trainer(tiny(), lora())
    with pytest.raises(ValueError, match=f"model_name_or_path: {message}"):
        evaluation(tmp_path / "adapter", tmp_path)
    make_trainer(tiny(), max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: expected 0 .*, got 0.1"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_settings_that_cannot_be_trained(make_trainer, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny(), lora(**options))


def test_trainable_tokens_of_an_embedding_that_is_the_head_are_refused(make_trainer, tiny):
    make_trainer(tiny(), lora(trainable_token_indices=[1, 2]))
    message = r"LoRA's, got one with TrainableTokensWrapper; leave .* where they are tied, or train"
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny(tie_word_embeddings=True), lora(trainable_token_indices=[1, 2]))


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}),
        lambda: peft.PolyConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    ],
)
def test_adapters_with_a_forward_of_their_own_are_refused(make_trainer, tiny, config):
    message = r"^peft_config: (XLORA|POLY|ADAPTION_PROMPT) needs a forward of its own"
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny(), config())


def test_an_adapter_that_mixes_the_tokens_of_a_batch_is_refused(make_trainer, tiny):
    config = peft.LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = moved(peft.get_peft_model(copy.deepcopy(tiny()), config)).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        # What is refused: a later token changes what an earlier one is given.
        assert not torch.allclose(model(ids).logits[:, :10], model(ids[:, :10]).logits)
    with pytest.raises(ValueError, match="LILY computes a token by all tokens of its batch"):
        make_trainer(tiny(), config)


def test_an_adapter_that_draws_its_weights_is_refused(make_trainer, tiny):
    with pytest.raises(ValueError, match="peft_config: monteclora_config draws other weights"):
        make_trainer(tiny(), lora(monteclora_config=peft.MontecloraConfig()))


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "lora_ga"])
def test_what_loading_would_put_on_other_weights_is_refused(make_trainer, tiny, init):
    options = {"lora_ga_config": peft.LoraGAConfig()} if init == "lora_ga" else {}
    config = lora(init_lora_weights=init, **options)
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' changes the weights under"):
        make_trainer(tiny(), config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_loading_repeats_is_loaded_as_it_was_trained(
    make_trainer, tiny, tokenizer, tmp_path, init
):
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(base, lora(init_lora_weights=init), max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded, _ = load_model(ModelArguments(str(tmp_path / "run")))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_trained_weights_that_no_adapter_saves_are_refused(make_trainer, tiny):
    model = peft.get_peft_model(tiny(), lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 trained weights .* \(base_model\.model\.model\.norm\.wei"
    ):
        make_trainer(model)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["norm", "lm_head"]},
        {"trainable_token_indices": [3]},
    ],
)
def test_trained_weights_of_the_model_itself_are_saved(make_trainer, tiny, options):
    model = peft.get_peft_model(tiny(attention_bias=True), lora(**options))
    make_trainer(model)


def test_an_adapter_that_peft_cannot_save_is_refused(make_trainer, tiny, tmp_path):
    model = peft.get_peft_model(tiny(), lora(trainable_token_indices=[3]))
    model.add_adapter("second", lora())
    with pytest.raises(KeyError):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: its adapter 'second' cannot be saved"):
        make_trainer(model)


def test_models_that_cannot_be_trained(make_trainer, tiny):
    with pytest.raises(ValueError, match="adds tokens to every prompt"):
        make_trainer(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(TypeError, match=r"expected a peft\.PeftConfig, got dict"):
        make_trainer(tiny(), {"r": 4})
    with pytest.raises(ValueError, match="got one that has one"):
        make_trainer(adapted(tiny()), lora())
    merged = adapted(tiny())
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged"):
        make_trainer(merged)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(peft.get_peft_model(tiny(), lora(inference_mode=True)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--lora_r", "4"), "lora_r: expected --use_peft true with it"),
        (("--use_dora", "true"), "use_dora: expected --use_peft true"),
        (("--use_peft", "true", "--lora_r", "0"), "lora_r: expected at least 1, got 0"),
        (("--use_peft", "true", "--lora_dropout", "0.1"), "lora_dropout: expected 0 .*got 0.1"),
        (("--use_peft", "true", "--lora_target_modules", "nowhere"), "nowhere"),
    ],
)
def test_bad_arguments_leave_no_folder(model_dir, tmp_path, argv, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(["--model_name_or_path", str(model_dir), *SMALL, "--output_dir", str(output), *argv])
    assert not output.exists()

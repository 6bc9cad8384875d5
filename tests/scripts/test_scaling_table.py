"""The page's arithmetic agrees with counts of real models, layouts and updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from latro import LatroConfig, LatroTrainer
from latro.config.model import ModelArguments
from latro.config.training import SMALL_MODEL
from latro.engines.transformers import caches_in
from latro.loading import load_model
from latro.model.packing import Size, plan
from latro.rollout.sequences import Rollout
from latro.tasks import get_task
from scripts import scaling_table
from scripts.scaling_sizes import LLAMA_1B, LLAMA_8B, LLAMA_70B, Model, Qlora, Work
from scripts.scaling_table import main, render
from scripts.tables import ROOT

TINY = Model("tiny", 32, 80, 2, heads=4, kv_heads=2, head_dim=8, vocab=120)
WORK = Work(G=3, K=4, P=11, R=7, L=7, A=5)
aten = torch.ops.aten


def build(model: Model, **options: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            tie_word_embeddings=model.tied,
            **options,
        )
    )


def groups(work: Work) -> list[list[Rollout]]:
    ids = list(range(1, 100))
    rollout = Rollout(
        ids[: work.P], ids[: work.R], ids[: work.A], answer_start=work.R, finished=True
    )
    return [[rollout] * work.K for _ in range(work.G)]


def flops(counter: FlopCounterMode, *operations: object) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in operations)


def test_the_page_is_up_to_date():
    main(["--check"])


def test_a_number_changed_by_hand_is_found():
    page = scaling_table.PAGE.read_text(encoding="utf-8")
    assert "| published code |" in page
    assert render(page.replace("| published code |", "| published code! |")) == page
    with pytest.raises(ValueError, match=r"scaling\.md: expected one pair of markers of update"):
        render("no markers")


def test_the_bytes_of_a_quantised_model_and_the_weights_of_its_adapter(tmp_path):
    model = Model("tiny", 256, 512, 2, heads=8, kv_heads=4, head_dim=32, vocab=1024)
    build(model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(SMALL_MODEL).save_pretrained(tmp_path)
    arguments = ModelArguments(str(tmp_path), load_in_4bit=True, use_bnb_nested_quant=True)
    loaded, _ = load_model(arguments)
    layers = [m for m in loaded.modules() if isinstance(m, Linear4bit)]
    held = sum(layer.weight.nbytes for layer in layers)
    for state in (layer.weight.quant_state for layer in layers):
        held += state.absmax.nbytes + state.state2.absmax.nbytes
    qlora = Qlora(rank=4)
    assert held == pytest.approx(model.block_weights * qlora.bits / 8, rel=1e-3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = get_peft_model(loaded, lora).num_parameters(only_trainable=True)
    assert trained == qlora.parameters(model)


def test_the_recipe_for_one_card_is_the_one_that_is_reckoned():
    given = yaml.safe_load((ROOT / "recipes" / "gsm8k-llama-3.1-8b-24gb.yaml").read_text())
    work = scaling_table.WORK
    assert given["token_budget"] == scaling_table.QLORA_BUDGET >= work.packed_tokens
    assert given["lora_r"] == scaling_table.QLORA.rank
    assert given["per_device_train_batch_size"] == work.G
    assert (given["num_generations"], given["max_completion_length"]) == (work.K, work.L)
    assert given["use_bnb_nested_quant"] is given["activation_checkpointing"] is True
    parts = scaling_table.qlora_parts(
        LLAMA_8B, work, scaling_table.QLORA, scaling_table.QLORA_BUDGET
    )
    # More than a third of the card is left.
    assert sum(size for _, size in parts.values()) < 24 * 2**30 * 2 / 3


@pytest.mark.parametrize("model", [TINY, replace(TINY, tied=True), LLAMA_1B, LLAMA_8B, LLAMA_70B])
def test_parameters(model):
    with torch.device("meta"):
        assert build(model).num_parameters() == model.parameters


def test_a_forwards_operations():
    tokens = 13
    with FlopCounterMode(display=False) as counter:
        build(TINY, attn_implementation="eager")(torch.arange(tokens)[None])
    head = 2 * TINY.hidden * TINY.vocab * tokens
    assert flops(counter, aten.mm) == 2 * TINY.block_weights * tokens + head
    # Eager attention computes every pair, including masked ones.
    assert flops(counter, aten.bmm) == scaling_table.attention_flops(TINY, tokens**2)


def test_tokens_and_rows_of_a_prompt():
    (group, *_) = groups(WORK)
    assert Size.of(group).packed == WORK.packed_tokens
    assert sum(len(r.sampled_ids) + len(r.answer_ids) for r in group) == WORK.rows


@pytest.mark.parametrize("budget", [55, 60, 110, 500])
def test_micro_batches(budget):
    planned = plan(groups(WORK), budget, packed=True)
    assert scaling_table.micro_batches(WORK, budget) == len(planned)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_updates_operations_in_the_blocks(tmp_path, checkpoints):
    args = LatroConfig(
        output_dir=str(tmp_path), use_cpu=True, num_generations=WORK.K, disable_tqdm=True
    )
    row = {"prompt": "1 + 1?", "answer": "2"}
    trainer = LatroTrainer(
        build(replace(TINY, vocab=2048)),
        args,
        Dataset.from_list([row] * 3),
        AutoTokenizer.from_pretrained(SMALL_MODEL),
        get_task("arithmetic"),
    )
    if checkpoints:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        trainer.update(groups(WORK), WORK.G)
    # The counter does not see the fused head's products, which C++ computes.
    blocks, _, _ = scaling_table.update_flops(TINY, WORK, checkpoints=checkpoints)
    assert flops(counter, aten.mm) == WORK.G * blocks


def test_bytes_that_a_block_keeps_of_a_token():
    def kept(layers: int, tokens: int) -> int:
        model = build(replace(TINY, layers=layers)).to(torch.bfloat16)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                # Kept alive, since a freed address could be reused.
                saved[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.model(torch.arange(tokens)[None]).last_hidden_state
        assert out.requires_grad
        return sum(storage.nbytes() for storage in saved.values())

    more_layers = [kept(4, tokens) - kept(2, tokens) for tokens in (32, 64)]
    assert (more_layers[1] - more_layers[0]) / 32 / 2 == TINY.block_activations


class BytesOfCopies(TorchDispatchMode):
    """Adds up the bytes of cast copies of trained weights."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation is aten._to_copy.default and args[0].requires_grad and args[0].is_leaf:
            self.total += out.nbytes
        return out


def test_bytes_of_autocasts_copies():
    model = replace(TINY, tied=True)
    policy = build(model)
    with BytesOfCopies() as copies, torch.autocast("cpu", torch.bfloat16):
        # The second forward reuses the copies of the first.
        for _ in range(2):
            policy(torch.arange(9)[None])
    norms = sum(p.numel() for p in policy.parameters() if p.dim() == 1)
    assert copies.total == scaling_table.whole_weights(model) - scaling_table.BF16 * norms


def test_bytes_of_a_tokens_cache():
    model = build(TINY).to(torch.bfloat16)
    (cache,) = caches_in(model(torch.arange(9)[None], use_cache=True)).values()
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 9 * TINY.cache_bytes

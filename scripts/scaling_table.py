"""Write the tables of docs/scaling.md: what an update costs, by arithmetic from sizes.

    python -m scripts.scaling_table            # rewrite the page
    python -m scripts.scaling_table --check    # exit 1 where it differs

Nothing here is measured; `scripts/scaling_sizes.py` has the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.scaling_sizes import (
    BF16,
    BUDGET,
    FP32,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    NODE,
    QLORA,
    QLORA_BUDGET,
    WORK,
    Model,
    Node,
    Qlora,
    Work,
)
from scripts.tables import ROOT, fill, markdown, rewrite

PAGE = ROOT / "docs" / "scaling.md"


def attention_flops(model: Model, pairs: float) -> float:
    """Return the operations of one forward: scores, and their product with the values."""
    return 4 * model.layers * model.heads * model.head_dim * pairs


def update_flops(
    model: Model, work: Work, *, head: int = 8, checkpoints: bool = False
) -> tuple[float, float, float]:
    """Return the operations of blocks, attention and head in one prompt's update.

    Four forwards' worth: policy, reference, and twice the policy's for the backward. Checkpoints
    make all of a forward again but each block's last product, whose result nothing needs. The
    reference's head is a product, the policy's `head` / 2 of them.
    """
    weights = 4 * model.block_weights
    if checkpoints:
        weights += model.block_weights - model.layers * model.hidden * model.intermediate
    attention = (4 + checkpoints) * attention_flops(model, work.pairs)
    head_flops = (head + 2) * work.rows * model.hidden * model.vocab
    return 2 * weights * work.packed_tokens, attention, head_flops


def published_flops(model: Model, work: Work) -> tuple[float, float, float]:
    """Return the same for the published code: nine forwards of padded rows, the head at each token.

    Over x⊕z: policy and reference scored, policy once more with a backward. Over x⊕z⊕y: policy
    scored, and once more with a backward.
    """
    short, long = work.P + work.L, work.P + work.L + work.A
    tokens = work.K * (5 * short + 4 * long)
    pairs = work.K * (5 * short**2 + 4 * long**2) / 2
    return (
        2 * model.block_weights * tokens,
        attention_flops(model, pairs),
        2 * model.hidden * model.vocab * tokens,
    )


def decode_bytes(model: Model, work: Work) -> float:
    """Return the bytes that a device reads to sample an update's rationales of at most L tokens.

    Every step reads all weights but the embedding, and every sequence's keys and values; sequences
    that have ended are still read by `generate`.
    """
    weights = BF16 * (model.block_weights + model.vocab * model.hidden)
    cache = work.G * work.K * model.cache_bytes * (work.P + work.L / 2)
    return work.L * (weights + cache)


def state_bytes(engine: str, processes: int) -> dict[str, float]:
    """Return the bytes per parameter that a process holds throughout training, in mixed precision.

    `whole_weights` come on top for a time.
    """
    if engine == "DDP":
        # Its buckets are a second copy of the gradients.
        return {"weights": FP32, "gradients": 2 * FP32, "Adam": 2 * FP32, "reference": FP32}
    gradients = FP32 if engine == "FSDP2" else BF16
    # DeepSpeed has the weights in bf16 beside the fp32 ones that it steps.
    weights = FP32 if engine == "FSDP2" else FP32 + BF16
    held = {"weights": weights, "gradients": gradients, "Adam": 2 * FP32, "reference": BF16}
    return {name: size / processes for name, size in held.items()}


def whole_weights(model: Model) -> int:
    """Return the bytes of all weights in bf16, in every process.

    DDP: autocast's copies of the trained weights, in forward, backward and rollout. A sharding
    engine: what it gathers for a rollout.
    """
    return BF16 * model.parameters


def exchanged_bytes(model: Model, engine: str, processes: int, micro_batches: int) -> float:
    """Return the bytes that one process receives per update.

    DDP reduces fp32 gradients once. A sharding engine gathers bf16 weights for policy forward,
    backward and reference, and scatters bf16 gradients, in every micro-batch, and gathers once more
    for the rollout.
    """
    ring = (processes - 1) / processes * model.parameters
    if engine == "DDP":
        return 2 * FP32 * ring
    return (micro_batches * 4 + 1) * BF16 * ring


def micro_batches(work: Work, budget: int) -> int:
    """Return the number of micro-batches that hold whole groups of one size."""
    return -(-work.G // max(1, budget // work.packed_tokens))


@dataclass(frozen=True)
class Times:
    """Seconds of one update on each device."""

    rollout: float
    compute: float
    exchange: float

    @property
    def whole(self) -> float:
        """As if nothing of the exchange were hidden behind compute."""
        return self.rollout + self.compute + self.exchange


def update_times(model: Model, work: Work, node: Node, nodes: int, budget: int) -> Times:
    """Estimate an update with FSDP2 and activation checkpointing."""
    flops = work.G * sum(update_flops(model, work, checkpoints=True))
    sent = exchanged_bytes(model, "FSDP2", nodes * node.gpus, micro_batches(work, budget))
    return Times(
        rollout=decode_bytes(model, work) / (node.memory * node.bandwidth_share),
        compute=flops / (node.flops * node.utilisation),
        exchange=sent / node.bus(nodes),
    )


def update_table() -> str:
    rows = []
    for name, tokens, flops in (
        ("here", WORK.packed_tokens, update_flops(LLAMA_8B, WORK)),
        (
            "here, activation checkpointing",
            WORK.packed_tokens,
            update_flops(LLAMA_8B, WORK, checkpoints=True),
        ),
        ("published code", WORK.K * (WORK.P + WORK.L + WORK.A), published_flops(LLAMA_8B, WORK)),
    ):
        tera = [f"{1e-12 * part:,.0f}" for part in (*flops, sum(flops))]
        rows.append([name, f"{tokens:,}", *tera])
    header = ["one prompt", "tokens of a forward", "blocks, TFLOP", "attention", "head", "all"]
    return f"{_sizes()}\n\n{markdown(header, rows)}"


def vocabulary_table() -> str:
    rows = []
    for vocab in (32000, 128256, 256000):
        model = replace(LLAMA_8B, vocab=vocab)
        cells = [f"{vocab:,}"]
        for head in (4, 6, 8):
            flops = update_flops(model, WORK, head=head)
            cells.append(f"{1e-12 * flops[2]:.0f} ({flops[2] / sum(flops):.0%})")
        rows.append([*cells, f"{WORK.G * WORK.rows * vocab * FP32 / 2**30:.1f}"])
    header = ["V", "frozen head: 4 + 2, TFLOP", "products kept: 6 + 2", "none kept: 8 + 2"]
    header.append("fp32 logits of the update, never made, GiB")
    return markdown(header, rows)


def memory_table() -> str:
    rows = []
    for model in (LLAMA_1B, LLAMA_8B, LLAMA_70B):
        for engine, processes in (
            ("DDP", 8),
            *((engine, count) for engine in ("FSDP2", "ZeRO-3") for count in (8, 32)),
        ):
            held = {k: v * model.parameters for k, v in state_bytes(engine, processes).items()}
            cells = [*held.values(), sum(held.values()), whole_weights(model)]
            rows.append(
                [
                    f"{model.name}, {engine}, W = {processes}",
                    *(f"{1e-9 * cell:.1f}" for cell in cells),
                ]
            )
    header = ["GB per process", "weights", "gradients", "Adam", "reference", "together"]
    return markdown([*header, "and for a time, whole weights in bf16"], rows)


def activations_table() -> str:
    rows = []
    for budget in (2048, 4096, 16384, 65536):
        kept = budget * LLAMA_8B.layers * LLAMA_8B.block_activations
        checkpointed = activation_bytes(LLAMA_8B, budget)
        rows.append([f"{budget:,}", f"{1e-9 * kept:.1f}", f"{1e-9 * checkpointed:.1f}"])
    header = ["`--token_budget`", "all kept, GB", "activation checkpointing, GB"]
    return markdown(header, rows)


def activation_bytes(model: Model, tokens: int) -> int:
    """Return what a micro-batch keeps with activation checkpointing: blocks' inputs, one block."""
    return tokens * (model.layers * BF16 * model.hidden + model.block_activations)


def qlora_parts(
    model: Model, work: Work, qlora: Qlora, budget: int
) -> dict[str, tuple[str, float]]:
    """Return how each part of an update is reckoned on one device, and its bytes."""
    trained = qlora.parameters(model)
    largest = BF16 * model.hidden * model.intermediate
    # Room for a row's own tokens doubles as they come; a prompt's are kept once for all its rows.
    room = 2 ** math.ceil(math.log2(work.L))
    return {
        "blocks' matrices, 4 bits and nested scales": (
            f"{model.block_weights:,} weights · {qlora.bits:.3f} bits",
            model.block_weights * qlora.bits / 8,
        ),
        "embedding and head, bf16": (
            f"2 · {model.vocab:,} · {model.hidden:,} · 2 bytes",
            2 * BF16 * model.vocab * model.hidden,
        ),
        "adapter, its gradients and Adam's states of 8 bits": (
            f"{trained:,} weights · (4 + 4 + 2) bytes",
            trained * (2 * FP32 + 2),
        ),
        "the largest matrix, taken back to bf16": ("one at a time", largest),
        "head's kept products": ("a fixed 512 MiB", 2**29),
        "in a rollout: keys and values": (
            f"{work.G} · ({work.P} + {work.K} · {room}) tokens · {model.cache_bytes:,} bytes",
            work.G * (work.P + work.K * room) * model.cache_bytes,
        ),
        "in scoring and backward: activations": (
            f"{budget:,} tokens, with activation checkpointing",
            activation_bytes(model, budget),
        ),
    }


def qlora_table() -> str:
    parts = qlora_parts(LLAMA_8B, WORK, QLORA, QLORA_BUDGET)
    rows = [[name, how, f"{size / 2**30:.1f}"] for name, (how, size) in parts.items()]
    *held, rollout, activations = (size for _, size in parts.values())
    most = sum(held) + max(rollout, activations)
    rows.append(["at most at a time", "the last two are not there together", f"{most / 2**30:.1f}"])
    return markdown([f"{LLAMA_8B.name}, r = {QLORA.rank}", "reckoned as", "GiB"], rows)


def communication_table() -> str:
    rows = []
    for engine, budget in (("DDP", BUDGET), *(("FSDP2", b) for b in (BUDGET, 8192))):
        count = micro_batches(WORK, budget)
        cells = [f"{engine}, budget {budget:,}", str(count)]
        for nodes in (1, 4):
            processes = nodes * NODE.gpus
            sent = exchanged_bytes(LLAMA_8B, engine, processes, count)
            cells += [f"{1e-9 * sent:.0f}", f"{sent / NODE.bus(nodes):.2f}"]
        rows.append(cells)
    header = ["", "micro-batches", "1 × 8: GB", "seconds", "4 × 8: GB", "seconds"]
    return markdown(header, rows)


def example_table() -> str:
    rows = []
    base = _rate(WORK, 1)
    for label, work, nodes in (
        ("1 × 8, 3 prompts per GPU", WORK, 1),
        ("4 × 8, 3 prompts per GPU", WORK, 4),
        ("4 × 8, 1 prompt per GPU", replace(WORK, G=1), 4),
        ("4 × 8, 12 prompts per GPU", replace(WORK, G=12), 4),
    ):
        times = update_times(LLAMA_8B, work, NODE, nodes, BUDGET)
        parts = (times.rollout, times.compute, times.exchange, times.whole)
        rate = _rate(work, nodes)
        rows.append(
            [
                label,
                str(work.G * nodes * NODE.gpus),
                *(f"{part:.1f}" for part in parts),
                f"{rate:.2f}",
                f"{rate / base / nodes:.0%}",
            ]
        )
    header = ["", "prompts per update", "rollout, s", "compute, s", "exchange, s", "update, s"]
    table = markdown([*header, "prompts per second", "per GPU, relative to 1 × 8"], rows)
    return (
        f"{table}\n\nWith {NODE.flops / 1e12:.0f} TFLOP/s, of which {NODE.utilisation:.0%} are "
        f"reached, {NODE.memory / 1e12} TB/s, of which decoding reaches "
        f"{NODE.bandwidth_share:.0%}, links of {NODE.link / 1e9:.0f} GB/s and network cards of "
        f"{NODE.network / 1e9:.0f} GB/s per GPU, each in one direction; "
        f"a token budget of {BUDGET:,}, activation checkpointing, FSDP2."
    )


def _rate(work: Work, nodes: int) -> float:
    whole = update_times(LLAMA_8B, work, NODE, nodes, BUDGET).whole
    return work.G * nodes * NODE.gpus / whole


def _sizes() -> str:
    return (
        f"{LLAMA_8B.name} ({LLAMA_8B.parameters:,} parameters, {LLAMA_8B.block_weights:,} of them "
        f"in the blocks' matrices), K = {WORK.K}, P = {WORK.P}, R = {WORK.R} on average and "
        f"L = {WORK.L} at most, A = {WORK.A}:"
    )


TABLES = {
    "update": update_table,
    "vocabulary": vocabulary_table,
    "memory": memory_table,
    "activations": activations_table,
    "qlora": qlora_table,
    "communication": communication_table,
    "example": example_table,
}


def render(text: str, page: Path = PAGE) -> str:
    """Return the page with every table made anew; raise ValueError where a marker is missing."""
    return fill(text, {name: table() for name, table in TABLES.items()}, page.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables of docs/scaling.md, or check them."""
    rewrite([PAGE], render, __doc__, argv)


if __name__ == "__main__":
    main()

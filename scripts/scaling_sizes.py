"""The sizes that docs/scaling.md reckons with: of models, of an update's work, and of machines.

Sizes of models are those of their published configs; of devices, their data sheets'; what share of
a peak a program reaches is an assumption, made in `NODE`.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama: grouped queries, a gated MLP, no biases."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def block_weights(self) -> int:
        """Of the matrices of all blocks, each of which a token goes through once."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.block_weights + norms + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, in bf16."""
        return 2 * BF16 * self.layers * self.kv_heads * self.head_dim

    @property
    def block_activations(self) -> int:
        """Bytes that one block keeps of a token for its backward, in bf16.

        Two norms keep their input and its size in fp32, and their result before and after the
        weight; attention its three inputs, its output and, in fp32, a sum per head; the MLP four
        vectors of its width.
        """
        norms = 2 * (FP32 * (self.hidden + 1) + 2 * BF16 * self.hidden)
        attention = 2 * BF16 * self.head_dim * (self.heads + self.kv_heads) + FP32 * self.heads
        return norms + attention + 4 * BF16 * self.intermediate


@dataclass(frozen=True)
class Work:
    """A device's share of an update: G prompts of P tokens, K rationales of R, answers of A.

    R is the mean length of a rationale, and L the limit, which one of so many reaches.
    """

    G: int
    K: int
    P: int
    R: int
    L: int
    A: int

    @property
    def packed_tokens(self) -> int:
        """Through the trunk, of one prompt; nothing is predicted from an answer's last token."""
        return self.P + self.K * (self.R + self.A - 1)

    @property
    def rows(self) -> int:
        """At the head, of one prompt."""
        return self.K * (self.R + self.A)

    @property
    def pairs(self) -> float:
        """Queries times keys that they see, of one prompt, packed."""
        branch = self.R + self.A - 1
        return self.P**2 / 2 + self.K * (branch * self.P + branch**2 / 2)


@dataclass(frozen=True)
class Node:
    """GPUs of a node; bandwidths are in bytes per second and direction."""

    gpus: int
    flops: float
    memory: float
    link: float
    network: float
    utilisation: float
    bandwidth_share: float

    def bus(self, nodes: int) -> float:
        """Return a ring's bandwidth: over nodes at most that of one node's network cards."""
        return self.link if nodes == 1 else min(self.link, self.gpus * self.network)


@dataclass(frozen=True)
class Qlora:
    """An adapter of rank r on every matrix of a model's blocks, whose weights have 4 bits."""

    rank: int
    block: int = 64
    """Weights that share a scale; `nested` of these share a scale of their own."""
    nested: int = 256

    @property
    def bits(self) -> float:
        """Of a weight: its own, and its share of a scale of 8 and of that one's scale of 32."""
        return 4 + 8 / self.block + 32 / (self.block * self.nested)

    def parameters(self, model: Model) -> int:
        """Return the number of the adapter's weights: r of each input and output of a matrix."""
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = 2 * (model.hidden + queries) + 2 * (model.hidden + keys)
        return model.layers * self.rank * (attention + 3 * (model.hidden + model.intermediate))


LLAMA_1B = Model("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)
LLAMA_8B = Model("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_70B = Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256)
WORK = Work(G=3, K=16, P=150, R=275, L=500, A=8)
NODE = Node(8, 990e12, 3.35e12, 450e9, 50e9, utilisation=0.4, bandwidth_share=0.6)
BUDGET = 16384
QLORA, QLORA_BUDGET = Qlora(rank=16), 8192

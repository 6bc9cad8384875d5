"""Drawing in registers, where a test looks into the driver: in Triton's interpreter alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from latro_kernels import linear_logprob
from latro_kernels.linear_logprob.triton import blocks
from latro_kernels.linear_sample import noise, ops
from latro_kernels.linear_sample.triton import draw
from tests.latro_kernels.ops.linear_sample import INT64, problem
from tests.latro_kernels.ops.op import assert_same
from tests.latro_kernels.test_linear_sample import chi_square_tail, draws, shaped

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("small_tiles")]


@triton.jit
def words_kernel(
    words_ptr, seed_ptr, position_ptr, first_ptr, HAS_FIRST: tl.constexpr, FOURS: tl.constexpr
):
    seed = tl.load(seed_ptr + tl.arange(0, 4))[:, None]
    position = tl.load(position_ptr + tl.arange(0, 4))[:, None]
    fours = tl.arange(0, FOURS)[None, :]
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr)
    w0, w1, w2, w3 = draw.noise_words(seed, position, fours, first, HAS_FIRST)
    to = words_ptr + 4 * (tl.arange(0, 4)[:, None] * FOURS + fours)
    tl.store(to, w0)
    tl.store(to + 1, w1)
    tl.store(to + 2, w2)
    tl.store(to + 3, w3)


@triton.jit
def exponential_kernel(e_ptr, word_ptr, g_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = draw.exponential(tl.load(word_ptr + i).to(tl.uint32))
    tl.store(e_ptr + i, e)
    tl.store(g_ptr + i, -draw.log(e))


@pytest.mark.parametrize("first", [None, 0, 5, 6, 2**33 + 7])
def test_words_are_those_of_the_reference(first: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    seed, position = torch.randint(INT64.min, INT64.max, (2, 4), generator=random)
    seed[0] = position[1] = 0
    words = torch.empty(4, 32, dtype=torch.int64)
    of_first = None if first is None else torch.tensor(first)
    words_kernel[(1,)](words, seed, position, of_first, HAS_FIRST=first is not None, FOURS=8)
    # The reference's first column is 0: of counters that are far from there, four are made.
    begin = (first or 0) // 4
    counter = [torch.arange(begin, begin + 9)[None, :] & 0xFFFFFFFF]
    counter += [(position & 0xFFFFFFFF)[:, None], ((position >> 32) & 0xFFFFFFFF)[:, None]]
    key = ((seed & 0xFFFFFFFF)[:, None], ((seed >> 32) & 0xFFFFFFFF)[:, None])
    made = torch.stack(noise.philox((*counter, torch.zeros(4, 1).long()), key), -1).flatten(1)
    assert torch.equal(words, made[:, (first or 0) % 4 :][:, :32])


def test_variates_have_the_digits_of_fp32() -> None:
    """Small v, in whose logarithm 1 - v has none left, and v close to 1, too.

    The interpreter's logarithms are numpy's, which are a few steps off on some processors.
    """
    random = torch.Generator().manual_seed(0)
    powers = 2 ** torch.arange(32)
    word = torch.cat(
        [powers, powers - 1, 2**32 - powers, torch.randint(2**32, (8096,), generator=random)]
    )
    e, g = torch.empty(2, len(word), dtype=torch.float32)
    exponential_kernel[(len(word) // 64,)](e, word, g, BLOCK=64)
    exact = noise.gumbel(word, torch.float64)
    of_torch = noise.gumbel(word, torch.float32)
    error, unfused = ((x.double() - exact).abs() / exact.abs().clamp(min=1) for x in (g, of_torch))
    assert error.max() <= max(2 * unfused.max(), 2 * torch.finfo(torch.float32).eps)
    assert ((e.double() - (-exact).exp()) / (-exact).exp()).abs().max() <= 2.0**-22


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_log_probs_are_those_of_linear_logprob_in_many_tiles(
    dtype: torch.dtype, temperature: float
) -> None:
    given = problem((7, 9, 150), dtype, bias=True, softcap=5.0, temperature=temperature)
    drawn = given.solve("triton")
    of_rows = {name: given[name] for name in ("hidden", "weight", "bias", "softcap")}
    scored = linear_logprob(
        **of_rows,
        target=drawn["token"],
        temperature=temperature or 1.0,
        return_entropy=True,
        backend="triton",
    )
    assert torch.equal(drawn["logp"], scored[0])
    assert torch.equal(drawn["entropy"], scored[1])
    assert torch.equal(drawn["token"], given.truth()["token"])


def test_few_rows_are_drawn_as_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is made for 16, 32, 64 or all rows of a block."""
    block = blocks.Config(rows=128, columns=64, depth=32, warps=4, stages=1)
    monkeypatch.setattr(blocks, "_INTERPRETED", block)
    given = problem((130, 9, 140), torch.float16, bias=True)
    whole = given.solve("triton")
    for N in (1, 20, 40, 100):
        few = given.of_rows(slice(0, N)).solve("triton")
        assert_same(few, {name: rows[:N] for name, rows in whole.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("greedy", [False, True])
def test_ranks_number_their_columns_over_the_whole_vocabulary(
    dtype: torch.dtype, greedy: bool
) -> None:
    """Slices begin anywhere: a counter's four columns may be on two ranks."""
    given = problem((6, 9, 301), dtype, bias=True, temperature=0 if greedy else 1.0)
    names = ("hidden", "weight", "seed", "position", "bias")
    hidden, weight, seed, position, bias = (given[name] for name in names)
    found = []
    for first, last in itertools.pairwise((0, 66, 67, 201, 301)):
        token, score, token_logit, *_ = ops.sample(
            hidden=hidden,
            weight=weight[first:last],
            seed=seed,
            position=position,
            bias=bias[first:last],
            temperature=1.0,
            softcap=0.0,
            backend="triton",
            greedy=greedy,
            first_column=torch.tensor(first),
        )
        assert ((first <= token) & (token < last)).all()
        found.append(torch.stack([score, token.float(), token_logit]))
    scores, tokens, _ = torch.stack(found).unbind(1)
    best = tokens.gather(0, scores.argmax(0)[None, :])[0]
    assert torch.equal(best.long(), given.truth()["token"])


def test_tokens_follow_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks.Config(rows=512, columns=64, depth=16, warps=4, stages=1)
    monkeypatch.setattr(blocks, "_INTERPRETED", block)
    logits = shaped("masked")[:23].half()
    drawn = draws(logits, "triton", position=torch.arange(5000))
    p = logits.double().softmax(0)
    assert 1e-3 < chi_square_tail(drawn.token.bincount(minlength=23), p) <= 1
    wrong = chi_square_tail(drawn.token.bincount(minlength=23), logits.double().mul(1.2).softmax(0))
    assert wrong < 1e-3

"""What linear_sample alone has: its noise, the distribution of its tokens, and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from latro_kernels import LinearSample, linear_logprob, linear_sample
from latro_kernels.linear_sample import noise
from tests.latro_kernels.ops.linear_sample import OP, problem
from tests.latro_kernels.ops.op import (
    DTYPES,
    INTERPRETED,
    assert_same,
    device_of,
    each_backend,
    each_dtype,
    each_fused_backend,
)

# In Triton's interpreter interpreted/test_linear_sample.py makes fewer draws.
KERNELS = [
    pytest.param("cpu", torch.float32, id="cpu"),
    *(
        pytest.param("triton", dtype, id=f"triton-{dtype}", marks=pytest.mark.gpu)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    pytest.param("cuda", torch.float32, id="cuda", marks=pytest.mark.gpu),
]
each_kernel = pytest.mark.parametrize(("backend", "dtype"), KERNELS)
DRAWS = 1_000_000
ONES = 0xFFFFFFFF
# kat_vectors of Random123, the generator's own library: counter, key, result.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    made = noise.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, made)) == expected


def test_words_are_of_seed_position_and_column() -> None:
    """All 64 bits of both count, and columns take the words of a counter in their order."""
    expected = KNOWN[0][2]
    zero = torch.zeros(1, dtype=torch.int64)
    assert noise.words(zero, zero, 6)[0, :4].tolist() == list(expected)
    rows = torch.tensor([0, 1, 2**32, -1, -(2**63)])
    for seed, position in ((rows, torch.zeros_like(rows)), (torch.zeros_like(rows), rows)):
        made = noise.words(seed, position, 9)
        assert len(made.unique()) == made.numel() == 45
    fourth = noise.philox(tuple(map(torch.tensor, (1, 5, 3, 0))), tuple(map(torch.tensor, (7, 2))))
    many = noise.words(torch.tensor([2 * 2**32 + 7]), torch.tensor([3 * 2**32 + 5]), 8)
    assert many[0, 4:].tolist() == list(map(int, fourth))


def test_gumbel_variates_are_finite_and_ordered() -> None:
    words = torch.tensor([0, 1, 2, 2**31, 2**32 - 2**9, 2**32 - 1])
    variates = noise.gumbel(words, torch.float64)
    v = (words.double() + 0.5) / 2**32
    torch.testing.assert_close(variates[:4], -torch.log(-torch.log1p(-v[:4])), rtol=1e-6, atol=0)
    assert 22.8 < variates[0] < 22.9
    assert variates[-1] == -torch.log(24 * torch.tensor(2.0).double().log())
    assert (variates.diff() < 0)[:4].all()


def draws(logits: Tensor, backend: str = "cpu", **rows: Tensor) -> LinearSample:
    """Draw a token from one row of logits for each of the seeds, or of the positions."""
    N = len(next(iter(rows.values())))
    three = torch.full((N,), 3)
    given = {name: rows.get(name, three) for name in ("seed", "position")}
    given |= {"hidden": torch.ones(N, 1, dtype=logits.dtype), "weight": logits[:, None]}
    on_device = {name: t.to(device_of(backend)) for name, t in given.items()}
    return LinearSample(*(t.cpu() for t in linear_sample(**on_device, backend=backend)))


def chi_square_tail(counts: Tensor, p: Tensor) -> float:
    """Return the probability of counts as far from p as these; where p is 0 there must be none."""
    assert not counts[p == 0].any()
    counts, expected = counts[p > 0].double(), p[p > 0].double() * counts.sum()
    if len(counts) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)
    )


def shaped(name: str) -> Tensor:
    """Return a row of logits."""
    random = torch.Generator().manual_seed(1)
    if name == "flat":
        return torch.zeros(257)
    if name == "peaked":  # p of the first above 0.999, ten others share the rest
        return torch.tensor([9.3] + [0.0] * 10)
    if name == "one column":
        return torch.tensor([-3.0])
    logits = 2 * torch.randn(67, generator=random)
    if name == "masked":
        logits[::3] = -torch.inf
    return logits


@each_kernel
@pytest.mark.parametrize("counted", ["seed", "position"])
@pytest.mark.parametrize("name", ["flat", "peaked", "one column", "random", "masked"])
def test_tokens_follow_the_distribution(
    name: str, counted: str, backend: str, dtype: torch.dtype
) -> None:
    logits = shaped(name).to(dtype)
    drawn = draws(logits, backend, **{counted: torch.arange(DRAWS)})
    p = logits.double().softmax(0)
    counts = drawn.token.bincount(minlength=len(p))
    assert len(counts) == len(p)
    assert 1e-3 < chi_square_tail(counts, p) <= 1
    torch.testing.assert_close(drawn.logp.double(), p.log()[drawn.token], rtol=1e-6, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("apart", ["seed", "position"])
def test_neighbouring_draws_are_independent(apart: str, backend: str, dtype: torch.dtype) -> None:
    logits = shaped("random")[:7].to(dtype)
    token = draws(logits, backend, **{apart: torch.arange(DRAWS)}).token
    p = logits.double().softmax(0)
    pairs = (token[0::2] * 7 + token[1::2]).bincount(minlength=49)
    assert chi_square_tail(pairs, torch.outer(p, p).flatten()) > 1e-3


def test_a_distribution_that_is_wrong_by_a_percent_fails() -> None:
    token = draws(shaped("random"), seed=torch.arange(DRAWS)).token
    p = shaped("random").double().mul(1.01).softmax(0)
    assert chi_square_tail(token.bincount(minlength=67), p) < 1e-3


@each_kernel
@pytest.mark.parametrize("name", ["flat", "peaked", "masked"])
def test_backends_draw_the_same_tokens(name: str, backend: str, dtype: torch.dtype) -> None:
    """But where the two highest scores are as close as their rounding, which is not so here."""
    positions = torch.arange(30_000) * 2**40
    logits = shaped(name).to(dtype)
    ours, plain = (draws(logits, b, position=positions).token for b in (backend, "reference"))
    assert torch.equal(ours, plain)


@each_fused_backend
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 13, 203), (9, 14, 301)]
    if INTERPRETED
    else [(1, 130, 1203), (53, 140, 1203), (1100, 130, 200)],
)
@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_log_probs_are_those_of_linear_logprob(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    temperature: float,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit: importance ratios of samples are exactly 1."""
    if backend == "triton":
        from latro_kernels.linear_logprob.triton import blocks

        # The warp-specialised form, where it was measured as the fastest, rounds otherwise.
        monkeypatch.setattr(blocks, "has_gluon", lambda: False)
    given = problem(shape, dtype, bias=True, softcap=20.0, temperature=temperature).on(backend)
    drawn = LinearSample(**given.solve(backend))
    scored = linear_logprob(
        given["hidden"],
        given["weight"],
        drawn.token,
        bias=given["bias"],
        softcap=20.0,
        temperature=temperature or 1.0,
        return_entropy=True,
        backend=backend,
    )
    assert torch.equal(drawn.logp, scored[0])
    assert torch.equal(drawn.entropy, scored[1])


@each_dtype
def test_few_rows_draw_as_many_do(dtype: torch.dtype) -> None:
    """On the CPU few rows pass the weight as it lies, and many pass it packed."""
    many = problem((200, 140, 1203), dtype, bias=True)
    whole = many.solve("cpu")
    for count in (1, 7, 8, 9, 16, 33, 64, 65):
        rows = slice(100, 100 + count)
        part = many.of_rows(rows).solve("cpu")
        assert_same(part, {name: value[rows] for name, value in whole.items()})


@each_backend
def test_temperature_zero_takes_the_first_of_equal_logits(backend: str) -> None:
    given = problem((9, 8, 700), temperature=0).on(backend)
    given["weight"][300] = given["weight"][77]
    given["weight"][650] = given["weight"][77]
    given["hidden"][:5] = 9 * given["weight"][77]
    results = given.solve(backend)
    expected = (given["hidden"] @ given["weight"].T).argmax(1)
    assert results["token"][:5].tolist() == [77] * 5
    assert torch.equal(results["token"], expected)
    at_one = given.but(temperature=1.0).solve(backend)
    assert torch.equal(results["entropy"], at_one["entropy"])
    assert_same(results, given.but(seed=given["seed"] + 1).solve(backend))


@each_backend
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_without_a_distribution(backend: str, temperature: float) -> None:
    """NaN, +∞ or nothing but −∞ give token 0 and a logp of NaN, and no other row another result."""
    given = problem((6, 8, 500), bias=True, temperature=temperature).on(backend)
    expected = given.solve(backend)
    given["hidden"][1, 2] = torch.nan
    given["hidden"][3, 2] = torch.inf
    results = given.solve(backend)
    for row in range(6):
        if row in (1, 3):
            assert results["token"][row] == 0
            assert results["logp"][row].isnan()
            assert results["entropy"][row].isnan()
        else:
            assert all(results[name][row] == expected[name][row] for name in results)
    given["bias"][:] = -torch.inf
    results = given.solve(backend)
    assert not results["token"].any()
    assert results["logp"].isnan().all()


@each_backend
@each_dtype
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_masked_columns_are_never_drawn(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    """Though whole groups of columns are; the log-probs are those without them."""
    rows = 20 if INTERPRETED else 200
    given = problem((rows, 8, 1000), dtype, bias=True, temperature=temperature).on(backend)
    kept = torch.arange(612, 1000, 3, device=given["bias"].device)
    bias = torch.full_like(given["bias"], -torch.inf).index_copy(0, kept, given["bias"][kept])
    results = given.but(bias=bias).solve(backend)
    assert torch.isin(results["token"], kept).all()
    assert results["logp"].isfinite().all()
    few = given.but(weight=given["weight"][kept], bias=bias[kept])
    entropy = few.solve(backend)["entropy"]
    torch.testing.assert_close(results["entropy"], entropy, rtol=1e-5, atol=1e-6)


@each_fused_backend
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_logits_of_any_size(scale: float, backend: str) -> None:
    """Where logits are far larger than noise the arg max wins, and where they vanish noise does."""
    given = problem((50, 8, 300))
    given = given.but(hidden=given["hidden"] * scale)
    token = given.on(backend).solve(backend)["token"].cpu()
    of_noise = noise.gumbel(noise.words(given["seed"], given["position"], 300), torch.float64)
    z = given["hidden"].double() @ given["weight"].double().T
    assert torch.equal(token, (of_noise if scale < 1 else z).argmax(1))


@each_backend
def test_nothing_requires_grad(backend: str) -> None:
    given = problem((5, 8, 30), bias=True).on(backend)
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_()
    drawn = linear_sample(**given.arguments, backend=backend)
    assert isinstance(drawn, LinearSample)
    assert not any(result.requires_grad for result in drawn)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("form", OP.forms.values(), ids=OP.forms)
def test_compiles_once_for_any_number_of_rows(form: dict[str, Any]) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_sample, fullgraph=True, backend=counter)
    for N in (6, 8, 14, 16, 28):
        given = OP.of_rows(N, **form)
        # What of logp and entropy is made by torch may be rounded otherwise where it is compiled.
        torch.testing.assert_close(compiled(**given.arguments), linear_sample(**given.arguments))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    given = OP.plain(9, dtype)
    compiled = torch.compile(linear_sample, fullgraph=True)
    torch.testing.assert_close(compiled(**given.arguments), linear_sample(**given.arguments))


def test_autocast_casts_as_linear_does() -> None:
    given = problem((9, 150, 310), bias=True)
    low = given.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    with torch.autocast("cpu", torch.bfloat16):
        got = given.solve("cpu")
    assert_same(got, low.solve("cpu"))

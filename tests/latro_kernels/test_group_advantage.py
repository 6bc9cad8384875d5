"""group_advantage on every backend that runs here."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latro_kernels.group_advantage import KL_FORMS, GroupLayout, group_advantage
from tests.latro_kernels.group_cases import (
    SETTINGS,
    Batch,
    assert_equal_rewards_give_zero,
    assert_exact_advantages,
    assert_gate,
    assert_nan_stays_in_its_group,
    assert_same,
    assert_without_weight_an_infinite_kl_is_not_seen,
    batches,
    make_batch,
    objective,
    present,
    ragged_batch,
    run,
)


def _on_gpu(backend: str) -> object:
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.param(backend, "cuda", marks=[pytest.mark.gpu, no_gpu])


each_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [("reference", "cpu"), ("cpu", "cpu"), *map(_on_gpu, ("reference", "triton", "cuda"))],
)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))
SPOILABLE = make_batch([2, 3] * 9, 3, finished=[s != 4 for s in range(9)])
SMALL = make_batch([3, 2, 0, 1, 4, 3, 2, 5], 2, finished=[True, False, True, True])


@each_backend
@each_setting
@given(batch=batches(), beta=st.floats(0, 1), answer_weight=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_gate(
    backend: str,
    device: str,
    setting: dict[str, str],
    batch: Batch,
    beta: float,
    answer_weight: float,
) -> None:
    assert_gate(batch.to(device), backend, beta=beta, answer_weight=answer_weight, **setting)


@each_backend
@each_setting
def test_long_segments_and_many_sequences(
    backend: str, device: str, setting: dict[str, str]
) -> None:
    assert_gate(make_batch([100_000, 3, 0, 70_001], 2).to(device), backend, **setting)
    draw = random.Random(0)
    finished = [draw.random() < 0.9 for _ in range(1024)]
    lengths = [draw.randrange(40) for _ in range(2048)]
    assert_gate(make_batch(lengths, 1024, finished=finished).to(device), backend, **setting)


@each_backend
@each_setting
def test_segments_that_meet_where_kernels_cut(
    backend: str, device: str, setting: dict[str, str]
) -> None:
    """Segments that end on a kernel's block of rows, or beside it, and empty ones there."""
    draw = random.Random(2)
    lengths = [draw.choice([0, 1, 128, 255, 256, 512]) for _ in range(330)]
    finished = [draw.random() < 0.7 for _ in range(165)]
    assert_gate(make_batch(lengths, 33, finished=finished).to(device), backend, **setting)


@pytest.mark.parametrize(("backend", "device"), map(_on_gpu, ("triton", "cuda")))
@pytest.mark.parametrize("num_generations", [2, 1024])
@each_setting
def test_millions_of_ragged_rows(
    setting: dict[str, str], num_generations: int, backend: str, device: str
) -> None:
    batch = ragged_batch(num_generations).to(device)
    assert_gate(batch, backend, **setting)
    assert_same(run(batch, backend, **setting), run(batch, backend, **setting))


@each_backend
def test_rewards_large_and_close_together(backend: str, device: str) -> None:
    assert_exact_advantages(backend, device)


@each_backend
def test_equal_rewards_give_exactly_zero(backend: str, device: str) -> None:
    assert_equal_rewards_give_zero(backend, device)


@each_backend
@each_setting
def test_nan_stays_in_its_group(backend: str, device: str, setting: dict[str, str]) -> None:
    batch = SPOILABLE.to(device)
    assert_nan_stays_in_its_group(batch, backend, 4, **setting)
    if setting["unfinished"] == "floor":
        assert_nan_stays_in_its_group(batch, backend, 24, **setting)
    if setting["kl"] == "reward":
        assert_nan_stays_in_its_group(batch, backend, 0, **setting)


@each_backend
@pytest.mark.parametrize("kl", KL_FORMS)
def test_an_excluded_sequence_passes_nothing_on(backend: str, device: str, kl: str) -> None:
    batch = SPOILABLE.to(device)
    logp = batch.logp.clone()
    logp[20:25] = torch.nan
    spoilt = run(replace(batch, logp=logp), backend, kl=kl, unfinished="exclude")
    clean = run(batch, backend, kl=kl, unfinished="exclude")
    assert spoilt.reward[4].isnan()
    assert (clean.coefficient[20:25] == 0).all()
    torch.testing.assert_close(spoilt.advantage, clean.advantage, rtol=0, atol=0)
    torch.testing.assert_close(spoilt.coefficient, clean.coefficient, rtol=0, atol=0)


@each_backend
@each_setting
def test_same_bits_twice(backend: str, device: str, setting: dict[str, str]) -> None:
    batch = make_batch([9_001, 40, 12_345, 7, 0, 1, 3, 3], 2).to(device)
    assert_same(run(batch, backend, **setting), run(batch, backend, **setting))


@each_setting
def test_cpu_result_does_not_depend_on_threads(setting: dict[str, str]) -> None:
    batch = make_batch([900 + 7 * i for i in range(48)], 4)
    several = run(batch, "cpu", **setting)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert_same(several, run(batch, "cpu", **setting))
    finally:
        torch.set_num_threads(threads)


@each_setting
@given(batch=batches(), beta=st.floats(0, 1), answer_weight=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_coefficients_are_the_gradient_of_the_objective(
    setting: dict[str, str], batch: Batch, beta: float, answer_weight: float
) -> None:
    N = batch.logp.numel()
    generator = torch.Generator().manual_seed(N)
    logits = torch.randn(N, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(7, (N, 1), generator=generator)
    logp = logits.log_softmax(-1).gather(1, target).squeeze(1)
    ref_log_p = torch.randn(N, 7, dtype=torch.float64, generator=generator).log_softmax(-1)
    row_kl = (logits.log_softmax(-1) - ref_log_p).mul(logits.softmax(-1)).sum(-1)
    batch = replace(batch.double(), logp=logp, row_kl=row_kl)
    loss = objective(batch, beta, answer_weight, **setting)
    (expected,) = torch.autograd.grad(loss + 0 * logp.sum(), logits, retain_graph=True)

    out = run(batch, "reference", beta=beta, answer_weight=answer_weight, **setting)
    assert not any(value.requires_grad for value in present(out).values())
    ours = (out.coefficient * logp).sum()
    if out.kl_coefficient is not None:
        ours = ours + (out.kl_coefficient * row_kl).sum()
    (got,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, expected)


@each_backend
@each_setting
def test_micro_batches_add_up_to_the_update(
    backend: str, device: str, setting: dict[str, str]
) -> None:
    draw = random.Random(1)
    lengths = [draw.randrange(1, 9) for _ in range(24)]
    whole = make_batch(lengths, 3).to(device)
    parts = []
    for offsets in (whole.layout.offsets[:13], whole.layout.offsets[12:]):
        rows = slice(int(offsets[0]), int(offsets[-1]))
        layout = GroupLayout(offsets - offsets[0], 3, num_groups=4)
        part = Batch(whole.logp[rows], whole.ref_logp[rows], whole.row_kl[rows], layout)
        parts.append(run(part, backend, **setting))
    joined = torch.cat([part.coefficient for part in parts])
    torch.testing.assert_close(joined, run(whole, backend, **setting).coefficient, rtol=0, atol=0)


@each_backend
def test_without_a_reference(backend: str, device: str) -> None:
    batch = SMALL.to(device)
    for kl in KL_FORMS:
        out = group_advantage(batch.logp, None, batch.layout, beta=0, kl=kl, backend=backend)
        given = run(batch, backend, beta=0, kl=kl)
        assert out.kl_coefficient is None
        assert (out.kl == 0).all()
        assert not (given.kl == 0).all()
        torch.testing.assert_close(out.coefficient, given.coefficient, rtol=0, atol=0)


@each_backend
@each_setting
def test_without_weight_an_infinite_kl_is_not_seen(
    backend: str, device: str, setting: dict[str, str]
) -> None:
    assert_without_weight_an_infinite_kl_is_not_seen(SMALL.to(device), backend, **setting)


@each_backend
def test_strided_inputs_that_require_grad(backend: str, device: str) -> None:
    batch = SMALL.to(device)
    columns = torch.stack([batch.logp, batch.ref_logp], 1).requires_grad_()
    strided = replace(batch, logp=columns[:, 0], ref_logp=columns[:, 1])
    out = run(strided, backend)
    assert_same(out, run(batch, backend))
    assert not any(value.requires_grad for value in present(out).values())


def test_auto_is_the_cpu_backend_on_the_cpu() -> None:
    assert_same(run(SMALL, "auto"), run(SMALL, "cpu"))


def call(**changes: object) -> None:
    """A valid call, but for `changes`."""
    layout = {"offsets": SMALL.layout.offsets, "num_generations": 2}
    arguments = {"logp": SMALL.logp, "ref_logp": SMALL.ref_logp}
    for name, value in changes.items():
        (layout if name in GroupLayout.__dataclass_fields__ else arguments)[name] = value
    group_advantage(**{"layout": GroupLayout(**layout)} | arguments)


OFFSETS = SMALL.layout.offsets
BAD_INPUTS = [
    ({"logp": [1.0]}, TypeError, "logp: expected a tensor, got list"),
    ({"logp": SMALL.logp.double()}, TypeError, "logp: expected dtype torch.float32, got"),
    ({"logp": SMALL.logp[None]}, ValueError, r"logp: expected one dimension, got shape \(1, 20\)"),
    ({"logp": SMALL.logp.half(), "backend": "reference"}, TypeError, "float32 or torch.float64"),
    ({"ref_logp": SMALL.ref_logp[:-1]}, ValueError, r"ref_logp: expected shape \(20,\), got"),
    ({"ref_logp": SMALL.ref_logp.double()}, TypeError, "ref_logp: expected dtype torch.float32"),
    ({"ref_logp": SMALL.ref_logp.to("meta")}, ValueError, "ref_logp: expected device cpu"),
    ({"ref_logp": None}, ValueError, "ref_logp: expected a tensor where beta is not 0, got None"),
    ({"layout": OFFSETS}, TypeError, "layout: expected a GroupLayout, got Tensor"),
    ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets: expected device cpu, got meta"),
    ({"offsets": OFFSETS.int()}, TypeError, "offsets: expected dtype torch.int64, got torch.int32"),
    ({"offsets": OFFSETS[:-1]}, ValueError, "offsets: expected two segments a sequence"),
    ({"offsets": OFFSETS[:0]}, ValueError, "offsets: expected two segments a sequence"),
    ({"num_generations": 3}, ValueError, "expected whole groups of num_generations=3 sequences"),
    ({"num_generations": 1}, ValueError, "num_generations: expected 2 or more, got 1"),
    ({"num_generations": 2.0}, TypeError, "num_generations: expected an int, got float"),
    ({"num_groups": 1}, ValueError, "num_groups: expected 2 or more, got 1"),
    ({"num_groups": True}, TypeError, "num_groups: expected an int, got bool"),
    ({"finished": torch.ones(4)}, TypeError, "finished: expected dtype torch.bool"),
    (
        {"finished": torch.ones(3).bool()},
        ValueError,
        r"finished: expected shape \(4,\), got \(3,\)",
    ),
    ({"finished": torch.ones(4).bool().to("meta")}, ValueError, "finished: expected device cpu"),
    ({"beta": -0.1}, ValueError, "beta: expected 0 or more, got -0.1"),
    ({"beta": float("nan")}, ValueError, "beta: expected a finite number, got nan"),
    ({"beta": "0.1"}, TypeError, "beta: expected a float, got str"),
    ({"answer_weight": float("inf")}, ValueError, "answer_weight: expected a finite number"),
    ({"kl": "k1"}, ValueError, "kl: expected one of 'reward', 'k3', 'exact', got 'k1'"),
    ({"kl": "exact"}, ValueError, "ref_logp: expected None with kl='exact', got a tensor"),
    ({"kl": "exact", "ref_logp": None}, ValueError, "row_kl: expected a tensor where beta is not"),
    ({"row_kl": SMALL.logp}, ValueError, "row_kl: expected None with kl='reward', got a tensor"),
    ({"row_kl": SMALL.logp[1:]}, ValueError, r"row_kl: expected shape \(20,\), got"),
    ({"row_kl": SMALL.logp.double()}, TypeError, "row_kl: expected dtype torch.float32"),
    ({"unfinished": "drop"}, ValueError, "unfinished: expected one of 'floor', 'exclude', got"),
    ({"backend": "metal"}, ValueError, "backend: expected 'auto' or one of"),
    ({"backend": "cuda"}, ValueError, "backend 'cuda': expected tensors on cuda, got cpu"),
    ({"backend": "triton"}, ValueError, "backend 'triton': expected tensors on cuda, got cpu"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUTS)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    call()
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3, 4, 6], "expected first 0 and last 6, the number of rows, got 1 and 6"),
        ([0, 2, 3, 4, 9], "expected first 0 and last 6, the number of rows, got 0 and 9"),
        ([0, 3, 2, 4, 6], "expected ascending values, got 3 then 2 at 1"),
        ([0, 1, 9, 2, 6], "expected ascending values, got 9 then 2 at 2"),
    ],
)
def test_offsets_out_of_order(offsets: list[int], message: str) -> None:
    layout = GroupLayout(torch.tensor(offsets), 2)
    with pytest.raises(ValueError, match=message):
        layout.check(6)
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.zeros(6), torch.zeros(6), layout, backend="cpu")


def test_check_wants_answers() -> None:
    GroupLayout(torch.tensor([0, 0, 2, 4, 6]), 2).check(6)
    with pytest.raises(ValueError, match="answer of one row or more, got none for sequence 1"):
        GroupLayout(torch.tensor([0, 0, 2, 6, 6]), 2).check(6)


@each_backend
@each_setting
def test_opcheck(backend: str, device: str, setting: dict[str, str]) -> None:
    batch = SMALL.to(device)
    layout = batch.layout
    inputs = tuple(batch.of_kl(setting["kl"]).values())
    for kl_inputs, finished in ((inputs, layout.finished), ((None, None), None)):
        arguments = (batch.logp, *kl_inputs, layout.offsets, finished, 2, 2, 0.05, 1.0)
        torch.library.opcheck(
            torch.ops.latro_kernels.group_advantage.default,
            (*arguments, *setting.values(), backend),
        )


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), *map(_on_gpu, ("triton", "cuda"))])
@pytest.mark.parametrize(("kl", "dynamic"), [("k3", False), ("k3", True), ("exact", True)])
def test_compiles_to_one_graph(backend: str, device: str, kl: str, dynamic: bool) -> None:
    def loss(logp: Tensor, inputs: dict[str, Tensor], offsets: Tensor, finished: Tensor) -> Tensor:
        layout = GroupLayout(offsets, 2, finished)
        out = group_advantage(
            logp, layout=layout, kl=kl, unfinished="exclude", backend=backend, **inputs
        )
        coefficient = out.coefficient
        if out.kl_coefficient is not None:
            coefficient = coefficient + out.kl_coefficient
        return (coefficient * logp).sum() + out.reward.sum()

    batch = SMALL.to(device)
    inputs = (batch.of_kl(kl), batch.layout.offsets, batch.layout.finished)
    eager, compiled = (batch.logp.clone().requires_grad_() for _ in range(2))
    expected = loss(eager, *inputs)
    expected.backward()
    got = torch.compile(loss, fullgraph=True, dynamic=dynamic)(compiled, *inputs)
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("full", [False, True])
def test_triton_kernel_compiles(capability: int, full: bool) -> None:
    """To machine code, with and without everything optional; needs no GPU."""
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from latro_kernels.group_advantage.triton import BLOCK_N, group_advantage_kernel

    signature = {name: "*fp32" for name in group_advantage_kernel.arg_names if "_ptr" in name}
    signature |= {"offsets_ptr": "*i64", "finished_ptr": "*u8", "K": "i32"}
    signature |= dict.fromkeys(("scale", "beta", "answer_weight"), "fp32")
    constants = {
        "HAS_REF": full,
        "HAS_ROW_KL": not full,
        "HAS_FINISHED": full,
        "HAS_BETA": True,
        "K3": full,
        "EXCLUDE_UNFINISHED": full,
        "BLOCK_K": 1024 if full else 2,
        "BLOCK_N": BLOCK_N,
    }
    if not full:
        constants |= {"ref_logp_ptr": None, "finished_ptr": None}
    else:
        constants |= {"row_kl_ptr": None}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(group_advantage_kernel.fn, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]

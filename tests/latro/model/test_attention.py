from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig

from latro.model import attention as module
from latro.model import attention_form
from latro.model.attention import allow_shared_prefix
from latro.model.attention_form import AttentionForm
from latro.model.packing import collate, plan
from latro.model.scoring import Scorer
from latro.model.shared_prefix import SharedPrefix, gather
from tests.latro.other_models import other_model

CPU = torch.device("cpu")
WINDOWS = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma2": {"sliding_window": 7},
}


STATEFUL = [
    *("lfm2", "qwen3_5_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bamba", "falcon_h1"),
    *("nemotron_h", "granitemoehybrid", "zamba2", "recurrent_gemma"),
]
OTHERS = [
    # Each layer's kind by turns: sinks with a window, and without.
    ("gpt_oss", {"sliding_window": 7}),
    ("gpt_oss", {"sliding_window": 7, "num_key_value_heads": 4}),
    ("stablelm", {}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("nemotron", {}),
    # Branches begin within a chunk, and end in later ones.
    ("llama4_text", {"attention_chunk_size": 9}),
    # Without rotary positions, and with queries whose temperature changes within every segment.
    ("llama4_text", {"no_rope_layers": [1, 0], "attention_chunk_size": 5, "floor_scale": 3}),
    # Its layers take a view of what attention returns.
    ("jetmoe", {}),
    # Convolutions, gated delta rules and state-space layers, before and beside attention.
    *((architecture, {}) for architecture in STATEFUL),
]


@pytest.fixture
def sharper():
    """Larger weights, so that what is attended to matters."""

    def sharpen(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        return model

    return sharpen


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("architecture", WINDOWS)
def test_log_probs_and_gradients_equal_the_padded_forwards(
    tiny, rollouts, sharper, architecture, windowed
):
    options = WINDOWS[architecture] if windowed else {}
    check_against_padded(sharper(tiny(architecture, **options)).double(), rollouts(3, 4))


@pytest.mark.parametrize(("architecture", "options"), OTHERS)
def test_other_models_log_probs_and_gradients_equal_the_padded_forwards(
    tokenizer, rollouts, architecture, options
):
    model = other_model(architecture, tokenizer, **options).double()
    check_against_padded(model, rollouts(3, 4))


def check_against_padded(model, groups):
    upstream = torch.randn(collate(groups, CPU, packed=True).num_rows, dtype=torch.float64)
    results = []
    for packed in (True, False):
        own = copy.deepcopy(model)
        scorer = Scorer(own, backend="reference")
        assert scorer.packed
        logp = scorer(collate(groups, CPU, packed=packed)).logp
        (upstream * logp).sum().backward()
        results.append((logp, {name: p.grad for name, p in own.named_parameters()}))
    (packed_logp, packed_grads), (padded_logp, padded_grads) = results
    # transformers' norms, and softmax in eager attention, are fp32 even in an fp64 model.
    torch.testing.assert_close(packed_logp, padded_logp, rtol=1e-5, atol=1e-5)
    for name, theirs in padded_grads.items():
        scale = theirs.abs().max()
        torch.testing.assert_close(packed_grads[name], theirs, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "stablelm", "lfm2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_attends_in_the_same_way(
    tokenizer, rollouts, architecture, reentrant
):
    model = other_model(architecture, tokenizer)
    groups = rollouts(2, 4)
    grads = []
    for checkpointing in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointing:
            own.activation_checkpointing_enable({"use_reentrant": reentrant})
        scorer = Scorer(own)
        scorer(scorer.collate(groups)).logp.sum().backward()
        grads.append([p.grad for p in own.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_generation_is_as_it_was(tiny, tokenizer, sharper, architecture):
    model = sharper(tiny(architecture))
    ids = torch.tensor([tokenizer.encode("Tom has 9 pens. Tom gets 12.")])
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    before = model.generate(ids, generation_config=config)
    assert allow_shared_prefix(model)
    assert torch.equal(model.generate(ids, generation_config=config), before)
    assert allow_shared_prefix(model)
    assert model.config._attn_implementation in ("latro_sdpa", "latro_eager")


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_kernel_for_many_lengths_is_handed_the_right_keys(monkeypatch, window, softcap):
    """The variable-length path, on a stand-in that computes what the fused kernels document."""
    generator = torch.Generator().manual_seed(0)
    lengths, prefixes = (5, 3, 8, 4, 1, 2), (-1, 0, 0, -1, 3, 3)
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2))
    layout = SharedPrefix(lengths, prefixes, CPU)
    k, v = (t[:, :, layout.key_index] for t in (k, v))
    form = AttentionForm(0.3, window=window or float("inf"), softcap=softcap)
    expected = module._by_segment(q, k, v, layout, form)

    def stand_in(
        q,
        k,
        v,
        query_starts,
        key_starts,
        longest_q,
        longest_k,
        softmax_scale,
        causal,
        window_size,
        softcap,
    ):
        assert causal
        assert longest_q == query_starts.diff().max()
        assert longest_k == key_starts.diff().max()
        out = []
        for s in range(len(query_starts) - 1):
            rows = slice(query_starts[s], query_starts[s + 1])
            keys = slice(key_starts[s], key_starts[s + 1])
            for row in range(rows.start, rows.stop):
                last = keys.stop - (rows.stop - row)
                first = keys.start if window_size[0] < 0 else max(keys.start, last - window_size[0])
                own_k = k[first : last + 1].repeat_interleave(2, dim=1)
                own_v = v[first : last + 1].repeat_interleave(2, dim=1)
                scores = torch.einsum("hd,khd->hk", q[row], own_k) * softmax_scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), own_v))
        return torch.stack(out)

    monkeypatch.setattr(module, "_flash_attention", lambda: stand_in)
    ours = module._fused(q, k, v, layout, form)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
        ("import a_package_that_it_needs", "No module named 'a_package_that_it_needs'"),
    ],
)
def test_a_flash_attn_that_is_broken_is_not_passed_over(monkeypatch, tmp_path, text, error):
    (tmp_path / "flash_attn.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=error):
        module._flash_attention.__wrapped__()


def test_without_flash_attn_torchs_kernel_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert module._flash_attention.__wrapped__() is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [float("inf"), 40])
def test_the_fused_kernel_is_as_right_as_torchs_on_a_gpu(window):
    device = torch.device("cuda")
    layout = SharedPrefix((50, 33, 8, 71), (-1, 0, 0, -1), device)
    exact = [torch.randn(1, h, 162, 64, device=device, dtype=torch.float64) for h in (4, 2, 2)]
    upstream = torch.randn(1, 162, 4, 64, device=device, dtype=torch.float64)
    form = AttentionForm(0.125, window=window)

    def run(way, dtype):
        q, k, v = (t.to(dtype).requires_grad_() for t in exact)
        keys = [module._Gather.apply(t, layout.key_index) for t in (k, v)]
        out = way(q, *keys, layout, form)
        return [out, *torch.autograd.grad(out, (q, k, v), upstream.to(dtype))]

    assert module._has_fused(exact[0].bfloat16(), exact[2], form)
    with_sinks = replace(form, sink=torch.zeros(4, device=device))
    assert not module._has_fused(exact[0].bfloat16(), exact[2], with_sinks)
    truth = run(module._by_segment, torch.float64)
    fused, plain = (run(way, torch.bfloat16) for way in (module._fused, module._by_segment))
    for ours, theirs, true in zip(fused, plain, truth, strict=True):
        allowed = 2 * (theirs.double() - true).abs().max() + 1e-5
        assert (ours.double() - true).abs().max() <= allowed


def test_a_prefix_sums_the_gradients_of_its_branches_in_fp32():
    """K gradients of one size summed in bf16 lose what is below half a digit of the sum."""
    layout = SharedPrefix((2, *[1] * 600), (-1, *[0] * 600), CPU)
    x = torch.zeros(1, 1, 602, 1, dtype=torch.bfloat16, requires_grad=True)
    gather(x, 2, layout.key_index).sum().backward()
    assert x.grad[0, 0, :2, 0].tolist() == [600.0, 600.0]
    assert x.grad[0, 0, 2:, 0].eq(1).all()


def attend_last(q, k, v, form):
    """Attend from the last three of nine positions."""
    return module._one_segment(q, k, v, form, module._bias(form, 6, 9, like=q))


def test_what_segments_see_is_one_table_that_fully_causal_ones_do_not_need(monkeypatch):
    """A prompt of thousands of tokens would have a table of its square; a branch its own."""
    tables, bias = [], module._bias

    def recorded(form, first, end, like):
        tables.append((first, end))
        return bias(form, first, end, like)

    monkeypatch.setattr(module, "_bias", recorded)
    layout = SharedPrefix((900, 3, 5, 800, 2), (-1, 0, 0, -1, 3), CPU)
    k = torch.randn(1, 1, sum(layout.key_lengths), 4)
    q = torch.randn(1, 1, sum(layout.lengths), 4)
    module._by_segment(q, k, k, layout, AttentionForm(0.5))
    module._by_segment(q, q, q, SharedPrefix((1710,), (-1,), CPU), AttentionForm(0.5))
    assert tables == [(800, 905), (0, 0)]


def test_the_last_queries_see_the_window_that_ends_with_them():
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 9, 9))
    out = attend_last(q, k, v, AttentionForm(0.5, window=4))
    for i in range(3):
        seen = slice(6 + i - 3, 6 + i + 1)
        alone = scaled_dot_product_attention(
            q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], scale=0.5
        )
        torch.testing.assert_close(out[:, :, i : i + 1], alone)


def test_queries_see_the_chunk_that_they_stand_in():
    position = torch.arange(9)
    for chunk, window, positions in (
        (4, float("inf"), {3: [0, 1, 2, 3], 4: [4], 6: [4, 5, 6], 8: [8]}),
        (4, 2, {3: [2, 3], 4: [4], 6: [5, 6]}),
    ):
        form = AttentionForm(1.0, window=window, chunk=chunk)
        seen = form.sees(position[:, None], position)
        for query, keys in positions.items():
            assert seen[query].nonzero()[:, 0].tolist() == keys
    assert form.at_most(4).is_plain
    assert not form.at_most(5).is_plain


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_sink_takes_its_part_of_every_softmax(softcap):
    """By the formula, query after query; at −∞ it takes nothing, and far above all scores all."""
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 9, 9))
    sink = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    form = AttentionForm(0.5, window=6, softcap=softcap, sink=sink)
    out = attend_last(q, k, v, form)
    expected = torch.empty_like(out)
    for i in range(3):
        seen = slice(6 + i - 5, 6 + i + 1)
        scores = 0.5 * torch.einsum("hd,hkd->hk", q[0, :, i], k[0, :, seen])
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        e = scores.exp()
        weights = e / (e.sum(1) + sink.exp())[:, None]
        expected[0, :, i] = torch.einsum("hk,hkd->hd", weights, v[0, :, seen])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((upstream * t).sum(), sink)[0] for t in (out, expected))
    torch.testing.assert_close(ours, theirs)

    none, whole = (replace(form, sink=torch.full((2,), s)) for s in (-float("inf"), 1e4))
    without = attend_last(q, k, v, replace(form, sink=None))
    torch.testing.assert_close(attend_last(q, k, v, none), without)
    assert (attend_last(q, k, v, whole) == 0).all()


def test_a_model_that_cannot_is_run_padded_and_says_so(tiny, rollouts, caplog, monkeypatch):
    monkeypatch.setattr(attention_form, "layer_type", lambda layer: "compressed_attention")
    scorer = Scorer(tiny())
    assert not scorer.packed
    (told,) = [r.message for r in caplog.records if "own copy of the prompt, padded" in r.message]
    assert "(a packed row in a layer of type compressed_attention)" in told
    groups = rollouts(2, 4)
    assert scorer.collate(groups).shared_prefix is None
    assert torch.isfinite(scorer(scorer.collate(groups)).logp).all()


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices"])
def test_a_layer_that_attends_by_something_unknown_is_refused(tiny, name):
    layer = tiny().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=f"a packed row with {name}"):
        attention_form.attention_form(layer, torch.zeros(1, 4, 3, 8), {name: torch.zeros(1)})


def test_attention_that_looks_elsewhere_is_found_out(tiny, monkeypatch, caplog):
    """A model whose attention ignores the segments is not trusted with a packed row."""
    own = module._by_segment

    def careless(query, key, value, layout, *rest):
        # Every branch reads the first prompt.
        start = sum(layout.key_lengths[: layout.prefixes[1:].index(-1) + 2])
        key[:, :, start : start + layout.lengths[0]] = key[:, :, : layout.lengths[0]]
        return own(query, key, value, layout, *rest)

    monkeypatch.setattr(module, "_by_segment", careless)
    assert not Scorer(tiny()).packed
    assert "(its hidden states differ by " in caplog.text


def test_long_rope_sequences_are_kept_apart(tiny, rollouts, sharper):
    """Rows past the original length take the long frequencies, and no others do."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
    }
    model = sharper(tiny("phi3", rope_parameters=rope, original_max_position_embeddings=24))
    scorer = Scorer(model)
    assert scorer.boundary == 24
    groups = rollouts(3, 4)
    lengths = [len(r.input_ids) for group in groups for r in group]
    assert min(lengths) <= 24 < max(lengths)
    planned = plan(groups, 10**6, packed=True, boundary=scorer.boundary)
    for piece in [piece for micro in planned for piece in micro]:
        together = scorer(scorer.collate(piece)).logp
        alone = [scorer(collate([[r]], CPU, packed=False)).logp for g in piece for r in g]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    mixed = scorer(collate(groups, CPU, packed=False)).logp
    alone = [scorer(collate([[r]], CPU, packed=False)).logp for g in groups for r in g]
    # Which is what would happen without a boundary.
    assert (mixed - torch.cat(alone)).abs().max() > 1e-3

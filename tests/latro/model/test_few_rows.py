from __future__ import annotations

import pytest
import torch
from torch import nn

from latro.model import few_rows as module
from latro.model.few_rows import few_rows
from latro_kernels import few_rows_linear


class Quantised(nn.Linear):
    """Stands for a layer of another library."""


@pytest.fixture
def counted(monkeypatch):
    """Count the rows that the kernel takes in each call."""
    calls = []

    def count(x, weight, bias):
        calls.append(x.numel() // x.shape[-1])
        return few_rows_linear(x, weight, bias)

    monkeypatch.setattr(module, "few_rows_linear", count)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_have_the_same_bits_whatever_is_beside_them(counted, monkeypatch, dtype, bias):
    monkeypatch.setattr(module, "MOST_ROWS", 64)
    layer = nn.Linear(40, 33, bias=bias, dtype=dtype)
    x = torch.randn(64, 40, dtype=dtype)
    true = layer.double()(x.double())
    layer.to(dtype)
    plain = layer(x)
    with few_rows(nn.ModuleList([layer])):
        together = layer(x)
        for rows in (slice(0, 1), slice(3, 10)):
            assert torch.equal(layer(x[None, rows])[0], together[rows])
        assert torch.equal(layer(x.repeat(2, 1)), nn.functional.linear(x.repeat(2, 1), *_of(layer)))
    assert counted == [64, 1, 7]
    allowed = 2 * (plain.double() - true).abs().max() + 1e-5
    assert (together.double() - true).abs().max() <= allowed
    assert torch.equal(layer(x), plain)


def _of(layer):
    return layer.weight, layer.bias


@torch.no_grad()
def test_other_layers_are_left_as_they_are(counted):
    own = nn.Linear(8, 8)
    own.forward = given = lambda x: x
    layers = nn.ModuleList([Quantised(8, 8), own, nn.Linear(8, 8).double(), nn.Embedding(8, 8)])
    before = [layer.__dict__.get("forward") for layer in layers]
    with few_rows(layers):
        assert [layer.__dict__.get("forward") for layer in layers] == before
    assert own.forward is given


@torch.no_grad()
def test_autocast_keeps_its_casts(counted):
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16), few_rows(nn.ModuleList([layer])):
        assert layer(x).dtype == torch.bfloat16
    assert counted == []


def test_an_error_puts_the_forwards_back():
    layer = nn.Linear(8, 8)

    def interrupted():
        with few_rows(nn.ModuleList([layer])):
            assert "forward" in layer.__dict__
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "forward" not in layer.__dict__


@torch.no_grad()
def test_layers_under_an_adapter_take_few_rows(tiny, counted):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(tiny(), lora).eval()
    ids = torch.arange(1, 6)[None]
    plain = model(ids).logits
    with few_rows(model):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-5)
    # Seven layers with two matrices of their adapters each, in two blocks.
    assert len(counted) >= 2 * 7 * 3
    assert set(counted) == {5}

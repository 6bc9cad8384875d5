from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latro_kernels import DecodedRows, KeptKeys, decode_attention
from latro_kernels.decode_attention import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Prompts' lengths; each row's prompt and the tokens of its own that it has read.
PROMPT_LENGTHS = [5, 0, 70, 131]
PROMPT, LENGTH = [0, 3, 2, 3, 1, 2], [0, 7, 129, 3, 0, 64]


def problem(heads=6, key_heads=2, size=24, value_size=24, dtype=torch.float64, scale=1.0):
    """Return query, key, value, room that holds NaN where nothing was written, and rows."""
    numbers = torch.Generator().manual_seed(0)

    def drawn(*shape):
        x = torch.randn(*shape, generator=numbers, dtype=torch.float64) * scale
        return x.to(torch.bfloat16 if dtype != torch.float16 else dtype).to(dtype)

    R, room, own = len(PROMPT), max(PROMPT_LENGTHS) + 3, max(LENGTH) + 2
    kept = KeptKeys(
        drawn(len(PROMPT_LENGTHS), key_heads, size, room),
        drawn(len(PROMPT_LENGTHS), key_heads, room, value_size),
        drawn(R + 2, key_heads, size, own),
        drawn(R + 2, key_heads, own, value_size),
    )
    for prompt, length in enumerate(PROMPT_LENGTHS):
        kept.prompt_keys[prompt, :, :, length:] = torch.nan
        kept.prompt_values[prompt, :, length:] = torch.nan
    for row, length in enumerate([*LENGTH, 0, 0]):
        kept.own_keys[row, :, :, length:] = torch.nan
        kept.own_values[row, :, length:] = torch.nan
    lengths = torch.tensor([PROMPT_LENGTHS[prompt] for prompt in PROMPT])
    rows = DecodedRows(torch.tensor(PROMPT), lengths, torch.tensor(LENGTH))
    q, k, v = drawn(R, heads, size), drawn(R, key_heads, size), drawn(R, key_heads, value_size)
    return q, k, v, kept, rows


def to(dtype, q, k, v, kept, rows):
    """Return a problem in another dtype, with room of its own."""
    rooms = (kept.prompt_keys, kept.prompt_values, kept.own_keys, kept.own_values)
    q, k, v, *copies = (t.to(dtype, copy=True) for t in (q, k, v, *rooms))
    return q, k, v, KeptKeys(*copies), rows


def unfused(q, k, v, kept, rows, *, scaling, window=None, softcap=None):
    """Attend row by row in the dtype of the query, with all that makes."""
    out = []
    for row in range(len(q)):
        prompt, P, n = (int(t[row]) for t in (rows.prompt, rows.prompt_length, rows.length))
        keys = [kept.prompt_keys[prompt, ..., :P], kept.own_keys[row, ..., :n], k[row][..., None]]
        values = [kept.prompt_values[prompt, :, :P], kept.own_values[row, :, :n], v[row][:, None]]
        groups = q.shape[1] // k.shape[1]
        keys = torch.cat(keys, dim=2).repeat_interleave(groups, dim=0)
        values = torch.cat(values, dim=1).repeat_interleave(groups, dim=0)
        scores = q[row][:, None] @ keys * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        first = 0 if window is None else max(0, P + n + 1 - window)
        out.append((scores[..., first:].softmax(-1) @ values[:, first:])[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 6, 100, 10_000])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_errors_are_at_most_twice_the_unfused(dtype, softcap, window, scale):
    given = problem(dtype=torch.float64 if dtype != torch.float16 else dtype, scale=scale)
    options = {"scaling": 0.3, "window": window, "softcap": softcap}
    true = reference(*to(torch.float64, *given), **options)
    plain = unfused(*to(dtype, *given), **options)
    ours = decode_attention(*to(dtype, *given), **options)
    assert ours.dtype == dtype
    allowed = 2 * (plain.double() - true).abs().max() + 1e-5
    assert (ours.double() - true).abs().max() <= allowed


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "value_size"),
    [(1, 1, 1, 1), (4, 4, 8, 8), (10, 2, 33, 70), (7, 1, 64, 64), (3, 1, 128, 65), (8, 1, 16, 3)],
)
def test_heads_and_sizes(heads, key_heads, size, value_size):
    given = problem(heads, key_heads, size, value_size)
    options = {"scaling": size**-0.5}
    true = reference(*given, **options)
    plain = unfused(*to(torch.float32, *given), **options)
    ours = decode_attention(*to(torch.float32, *given), **options)
    allowed = 2 * (plain.double() - true).abs().max() + 1e-5
    assert (ours.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_new_key_and_value_are_kept_and_nothing_else_changes(dtype):
    q, k, v, kept, rows = to(dtype, *problem())
    before = to(dtype, q, k, v, kept, rows)[3]
    decode_attention(q, k, v, kept, rows, scaling=1.0)
    for row, length in enumerate(LENGTH):
        before.own_keys[row, :, :, length] = k[row]
        before.own_values[row, :, length] = v[row]
    for name in ("prompt_keys", "prompt_values", "own_keys", "own_values"):
        torch.testing.assert_close(
            getattr(kept, name), getattr(before, name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_are_its_own(dtype):
    """Whatever rows there are, on any number of threads, and in any room."""
    given = problem()
    options = {"scaling": 0.3, "window": 90}
    together = decode_attention(*to(dtype, *given), **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(decode_attention(*to(dtype, *given), **options), together)
    finally:
        torch.set_num_threads(threads)
    for row in range(len(PROMPT)):
        q, k, v, kept, rows = to(dtype, *given)
        one = slice(row, row + 1)
        more = torch.nn.functional.pad(kept.own_keys[one], (0, 70))
        alone = decode_attention(
            q[one],
            k[one],
            v[one],
            replace(
                kept,
                own_keys=more,
                own_values=torch.nn.functional.pad(kept.own_values[one], (0, 0, 0, 70)),
            ),
            DecodedRows(*(t[one].clone() for t in (rows.prompt, rows.prompt_length, rows.length))),
            **options,
        )
        assert torch.equal(alone[0], together[row])


def test_strides_and_no_rows():
    q, k, v, kept, rows = to(torch.float32, *problem())
    plain = decode_attention(q, k, v, kept, rows, scaling=1.0)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(decode_attention(*strided, kept, rows, scaling=1.0), plain)
    none = DecodedRows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))
    out = decode_attention(q[:0], k[:0], v[:0], kept, none, scaling=1.0)
    assert out.shape == (0, 6, 24)


def test_the_op_is_registered_as_it_is():
    q, k, v, kept, rows = to(torch.float32, *problem(size=8, value_size=8))
    rooms = (kept.prompt_keys, kept.prompt_values, kept.own_keys, kept.own_values)
    # What nothing was written to holds NaN, which is not equal to itself.
    arguments = (q, k, v, *(t.nan_to_num() for t in rooms))
    arguments += (rows.prompt, rows.prompt_length, rows.length, 0, 1.0, 0.0)
    torch.library.opcheck(ops.attend, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(6, 5, 24)}, ValueError, "query: expected a multiple of the 2 heads"),
        ({"query": torch.zeros(6, 6)}, ValueError, "query: expected"),
        ({"key": torch.zeros(6, 2, 23)}, ValueError, r"key: expected shape \(6, 2, 24\)"),
        ({"value": torch.zeros(5, 2, 24)}, ValueError, r"value: expected shape \(6, 2, 24\)"),
        ({"key": torch.zeros(6, 2, 24).half()}, TypeError, "key: expected the dtype of query"),
        ({"query": torch.zeros(6, 6, 24).double()}, TypeError, "query: expected"),
        ({"window": 0}, ValueError, "window: expected 1 or more, got 0"),
        ({"window": 2**63}, ValueError, "window: expected an int that int64 holds, got 9"),
        ({"window": 2.5}, TypeError, "window: expected an int, got float"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
        ({"softcap": 1e-45}, ValueError, "softcap: expected a number that fp32 holds"),
        ({"softcap": "1"}, TypeError, "softcap: expected a float, got str"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number, got nan"),
        ({"scaling": None}, TypeError, "scaling: expected a float, got NoneType"),
        ({"prompt": [0, 4, 0, 0, 0, 0]}, ValueError, "prompt: expected 0 to 3, got 0 to 4"),
        ({"length": [0, 131, 0, 0, 0, 0]}, ValueError, "length: expected 0 to 130, got 0 to 131"),
        ({"length": [0, -1, 0, 0, 0, 0]}, ValueError, "length: expected 0 to 130, got -1 to 0"),
        ({"prompt_length": [135] * 6}, ValueError, "prompt_length: expected 0 to 134, got 135"),
        ({"prompt": [0] * 5}, ValueError, r"prompt: expected shape \(6,\)"),
        ({"own_keys": torch.zeros(6, 2, 131, 24).transpose(2, 3)}, ValueError, "a contiguous"),
        ({"own_keys": torch.zeros(5, 2, 24, 131)}, ValueError, "own_values: expected shape"),
    ],
)
def test_bad_arguments(change, error, message):
    q, k, v, kept, rows = to(torch.float32, *problem())
    given = {"query": q, "key": k, "value": v, "scaling": 1.0}
    given |= {
        name: value for name, value in change.items() if name in ("window", "softcap", *given)
    }
    indices = {n: torch.tensor(x) for n, x in change.items() if isinstance(x, list)}
    rooms = {n: x for n, x in change.items() if n in ("own_keys",)}
    with pytest.raises(error, match=message):
        decode_attention(**given, kept=replace(kept, **rooms), rows=replace(rows, **indices))


def test_too_many_rows_for_the_room():
    q, k, v, kept, rows = to(torch.float32, *problem())
    fewer = replace(kept, own_keys=kept.own_keys[:5], own_values=kept.own_values[:5])
    with pytest.raises(ValueError, match="own_keys: expected room for 6 rows, got 5"):
        decode_attention(q, k, v, fewer, rows, scaling=1.0)


def test_lengths_that_grow_in_place_are_checked_again():
    """As in a loop that counts tokens in one tensor: past its room a row would write anywhere."""
    q, k, v, kept, rows = to(torch.float32, *problem())
    rows = replace(rows, length=torch.zeros_like(rows.length))
    room = kept.own_keys.shape[3]
    alike = rows.length.numpy()  # shares the memory, and torch does not see it written to
    for grown in (1, room - 1):
        decode_attention(q, k, v, kept, rows, scaling=1.0)
        alike[:] = grown
    decode_attention(q, k, v, kept, rows, scaling=1.0)
    for number in (room, -1):
        rows.length.fill_(number)
        with pytest.raises(ValueError, match=f"length: expected 0 to {room - 1}, got {number}"):
            decode_attention(q, k, v, kept, rows, scaling=1.0)

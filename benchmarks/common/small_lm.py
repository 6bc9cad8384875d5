"""A small language model trained on the spot, for benchmarks that need a head that knows something.

Random logits are the worst case of a method that skips improbable tokens: every token is about
equally improbable. `trained` gives hidden states, head and next tokens of a two-layer Llama with a
BPE vocabulary of its own, trained for minutes on the questions and answers of a folder of
`train.jsonl` and `test.jsonl`, GSM8K's format. The states are of test text.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import report
from latro_kernels import linear_logprob
from scripts.make_tiny_model import make_model, make_tokenizer

_WARMUP_SHARE = 0.05
_EVALUATED_ROWS = 16384


@dataclass(frozen=True)
class Settings:
    """The model, and `steps` updates of `batch` sequences of `length` tokens each."""

    vocab: int = 8192
    hidden: int = 512
    layers: int = 2
    steps: int = 400
    batch: int = 16
    length: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


class TrainedHead(NamedTuple):
    """A head, in fp32, and what it has learned to predict.

    `hidden` [N, H] is of held-out text, `weight` [V, H] is the head's, and `target` [N] the tokens
    that came next. `perplexity` is over more of that text than N rows.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    perplexity: float


def trained(
    data: Path, settings: Settings, rows: int, *, cache: Path, device: torch.device
) -> TrainedHead:
    """Train the model on `data`; return its head, and its states of `rows` held-out tokens.

    The model is kept in the folder `cache` under a name made of settings and text, and is not
    trained again while it is there.

    Raises:
        FileNotFoundError: `data` lacks `train.jsonl` or `test.jsonl`.
        ValueError: the test text has fewer than `rows` tokens, or the train text is too short for
            the vocabulary or the sequences.
    """
    texts = {split: _read(data / f"{split}.jsonl") for split in ("train", "test")}
    tokenizer = make_tokenizer(texts["train"], settings.vocab)
    if len(tokenizer) != settings.vocab:
        raise ValueError(f"data: expected text for {settings.vocab} tokens, got {len(tokenizer)}")
    model = make_model(
        "llama",
        tokenizer,
        seed=settings.seed,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        head_dim=settings.hidden // 4,
        num_key_value_heads=4,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
    )
    model.to(device)
    digest = hashlib.sha256(json.dumps([asdict(settings), texts["train"]]).encode()).hexdigest()
    saved = cache / f"small_lm-{digest[:12]}.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved, map_location=device))
    else:
        train(model, _stream(tokenizer, texts["train"]), settings)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        report.write_bytes(saved, file.getvalue())
    stream = _stream(tokenizer, texts["test"])
    return _held_out(model, stream, length=settings.length, rows=rows)


def train(model: PreTrainedModel, stream: Tensor, settings: Settings) -> None:
    """Train on the next tokens of random windows of `stream` [T]; the seed decides which.

    Raises:
        ValueError: the stream is not longer than a window.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        settings.steps,
        pct_start=_WARMUP_SHARE,
        cycle_momentum=False,
    )
    last_start = len(stream) - settings.length - 1
    if last_start < 0:
        raise ValueError(
            f"stream: expected more than {settings.length} tokens, a window, got {len(stream)}"
        )
    window = torch.arange(settings.length)
    model.train()
    with tqdm(range(settings.steps), desc="  training a small LM") as steps:
        for _ in steps:
            starts = torch.randint(last_start + 1, (settings.batch, 1), generator=generator)
            at = starts + window
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = -_logp(model, stream[at], stream[at + 1]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            steps.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    model.eval()


def _logp(model: PreTrainedModel, tokens: Tensor, following: Tensor) -> Tensor:
    hidden = model.model(tokens.to(model.device)).last_hidden_state.flatten(0, 1)
    return linear_logprob(hidden, model.lm_head.weight, following.flatten().to(model.device))


@torch.no_grad()
def _held_out(model: PreTrainedModel, stream: Tensor, *, length: int, rows: int) -> TrainedHead:
    """Read whole windows of `stream`; return the first `rows` of their hidden states."""
    windows = (min(len(stream) - 1, max(rows, _EVALUATED_ROWS))) // length
    if windows * length < rows:
        raise ValueError(f"rows: expected at most {windows * length}, as in the text, got {rows}")
    tokens = stream[: windows * length].view(windows, length)
    target = stream[1 : windows * length + 1].to(model.device)
    weight = model.lm_head.weight.detach()
    hidden = torch.cat(
        [model.model(part.to(model.device)).last_hidden_state for part in tokens.split(16)]
    ).flatten(0, 1)
    perplexity = math.exp(-linear_logprob(hidden, weight, target).mean().item())
    return TrainedHead(
        hidden=hidden[:rows].clone(),
        weight=weight,
        target=target[:rows].clone(),
        perplexity=perplexity,
    )


def _read(path: Path) -> list[str]:
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [f"{record['question']}\n{record['answer']}" for record in records]


def _stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Return the tokens [T] of all texts, each followed by the end token."""
    ids = tokenizer(texts)["input_ids"]
    return torch.tensor([token for text in ids for token in (*text, tokenizer.eos_token_id)])

"""A row is decoded only where it may have ended, and ends where decoding all would end it."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latro.engines import ends
from latro.engines.ends import EndRule, TokenLetters
from latro.engines.transformers import TransformersEngine
from latro.rollout.answer_template import ending_pattern
from latro.rollout.sequences import decode
from scripts.make_tiny_model import make_tokenizer

PIECES = (
    *(
        "The answer is",
        "THE ANSWER IS",
        "the anſwer is",
        "The",
        " answer",
        " is",
        "isn't",
        "s",
        "n",
    ),
    *(
        " 5",
        ": ",
        "Answer:",
        "K",
        "K",
        "antwort",
        "é",
        "答案",
        "是",
        "答案是",
        "####",
        "# ",
        "\n",
        "\n\n",
    ),
    *("The  answer is", "canswer", "The answer", " is:", "İs", "ß", "🙂", "<0x41>", "ﬆ"),
)
TEMPLATES = ("The answer is", "Answer:", "Kelvin İst:", "答案是", "####", "\n\n", "</think>", "s é")
TEXTS = [
    " ".join(PIECES),
    "So the answer is 5. Tom has K pens, é and 答案 <0x41> </think> #### Kelvin.",
]


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer in the manner of SentencePiece, which spells the unknown in bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=tokens, show_progress=False, limit_alphabet=40
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose pieces are "##wer" alone and "wer" behind another."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[UNK]")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "make", [lambda: make_tokenizer(TEXTS, vocab_size=300), sentence_pieces, word_pieces]
)
def test_a_row_ends_where_it_would_if_all_were_decoded(make, template):
    tokenizer = make()
    rule = EndRule(tokenizer, [], template)
    pattern = ending_pattern(template)
    draw = random.Random(0)
    found = 0
    for _ in range(150):
        row: list[int] = []
        for _ in range(draw.randint(1, 8)):
            if draw.random() < 0.2:
                row.append(draw.randrange(len(tokenizer)))
            else:
                row += tokenizer.encode(draw.choice((*PIECES, template)), add_special_tokens=False)
        for length in range(1, len(row) + 1):
            tail = row[:length][-rule.window :]
            cut = int(length > rule.window)
            expected = pattern.search(decode(tokenizer, tail), cut) is not None
            assert rule([row[:length]]) == [expected], decode(tokenizer, row[:length])
            found += expected
    # A tokenizer may lack a template's characters, or drop its white space.
    spelled = decode(tokenizer, tokenizer.encode(f" {template}: 5"))
    assert found > 10 or not pattern.search(spelled)


def test_rows_that_state_nothing_are_not_decoded(tokenizer, monkeypatch):
    """As many rows as a GPU decodes at once took the host about as long as the step itself."""
    decoded = []

    def counted(tokenizer, rows):
        decoded.extend(rows)
        return [decode(tokenizer, row) for row in rows]

    monkeypatch.setattr(ends, "decode_batch", counted)
    ids = tokenizer.encode("Tom has 9 pens. Tom gets 12. " * 10)
    letters = TokenLetters(tokenizer)
    rows = [ids[first:] for first in range(50)]
    for length in range(1, 60):
        rule = EndRule(tokenizer, [], "The answer is", letters)
        assert not any(rule([row[:length] for row in rows]))
    assert not decoded
    # What a token spells is looked up once in a run.
    assert set(letters) <= set(ids)
    stated = ids + tokenizer.encode(" The answer is 5")
    assert rule([ids, stated]) == [False, True]
    assert len(decoded) == 1


def test_an_engine_looks_tokens_up_once_for_all_of_its_calls(tiny, tokenizer, monkeypatch):
    engine = TransformersEngine(tiny(), tokenizer)
    prompt = tokenizer.encode("Tom has 3.")
    options = {"num_samples": 4, "max_new_tokens": 6, "temperature": 1.0, "seeds": [0]}
    engine.generate([prompt], **options, template="The answer is")
    known = dict(engine._letters)
    assert known
    monkeypatch.setattr(ends, "decode", None)
    engine.generate([prompt], **options, template="The answer is")
    assert engine._letters == known

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latro.rollout.encoding import TextEncoder
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import decode
from tests.latro import frames
from tests.latro.frames import framed

TEXT = "What does <|endoftext|> mean? And <yes>?"


@pytest.fixture
def special(tokenizer):
    """Return a tokenizer that adds a beginning token, and that has labels as special tokens."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>"]})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def pieces_of_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens among its pieces, as Unigram tokenizers have."""
    letters = sorted(set("▁/?<>andesory"))
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<yes>", 0.0), *((c, -5.0) for c in letters)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<yes>"]})
    assert made.eos_token_id in made.encode("an </s> end", split_special_tokens=True)
    return made


def test_what_spells_a_special_token_is_text(special):
    encoder = TextEncoder(special)
    ids = encoder(TEXT)
    assert decode(special, ids) == TEXT
    assert not set(ids) & set(special.all_special_ids)
    assert encoder.spells_special(TEXT)
    assert encoder(TEXT, add_special_tokens=True) == [special.bos_token_id, *ids]


@pytest.mark.parametrize("text", ["How many pens? 2+3=5.\n\n  é “5”", "", "<eos> </s>"])
def test_other_text_is_what_the_tokenizer_makes_of_it(special, text):
    encoder = TextEncoder(special)
    assert encoder(text) == special.encode(text, add_special_tokens=False)
    assert encoder(text, add_special_tokens=True) == special.encode(text)
    assert not encoder.spells_special(text)


@pytest.mark.parametrize("text", ["an </s> end", "</s>", "</s></s>", "<yes> or </s>?", "<yes>"])
def test_special_tokens_among_the_pieces_of_words_are_cut(text):
    made = pieces_of_words()
    ids = TextEncoder(made)(text)
    assert not set(ids) & (set(made.all_special_ids) - {made.unk_token_id})
    assert decode(made, ids) == text
    assert TextEncoder(made).spells_special(text)


def test_raw_prompts_are_text_behind_the_tokens_that_are_always_added(special):
    assert encode_prompt(special, TEXT) == [special.bos_token_id, *TextEncoder(special)(TEXT)]
    assert encode_prompt(special, f"<s>{TEXT}") == encode_prompt(special, TEXT)
    made = pieces_of_words()
    assert made.eos_token_id not in encode_prompt(made, "an </s> end")


FRAMES = {
    "chatml": (frames.CHATML, ["<|im_start|>", "<|im_end|>"]),
    "phi": (frames.PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "gemma": (frames.GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "llama": (frames.LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral": (frames.MISTRAL, ["[INST]", "[/INST]"]),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frames_special_tokens_are_tokens_and_the_contents_are_not(tokenizer, frame):
    template, tokens = FRAMES[frame]
    made = framed(tokenizer, template, *tokens)
    plain = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": " And then? "},
    ]
    spelling = copy.deepcopy(plain)
    spelling[0]["content"] = f"What does {tokens[-1]} mean? {tokens[0]}{tokens[0]}"
    spelling[1]["content"] = f"{made.eos_token} is an end. {made.bos_token}"
    spelling[2]["content"] = f" And {made.eos_token} {tokens[-1]}"
    special = set(made.all_special_ids)
    ids = encode_prompt(made, spelling)
    assert decode(made, ids) == made.apply_chat_template(
        spelling, tokenize=False, add_generation_prompt=True
    )
    expected = encode_prompt(made, plain)
    assert [i for i in ids if i in special] == [i for i in expected if i in special] != []


def test_a_frame_around_quoted_text_is_read_as_without_quotes(tokenizer):
    """A token absorbs the white space after it even before text that spells special tokens."""
    made = framed(tokenizer, frames.PHI)
    made.add_tokens(
        [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "end")]
    )
    user, end = made.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    ids = encode_prompt(made, "<|end|> is what?")
    assert ids[0] == user
    assert ids[1 : ids.index(end)] == TextEncoder(made)("<|end|> is what?")
    assert decode(made, ids) == "<|user|><|end|> is what?<|end|><|assistant|>\n"


def test_a_template_may_cut_and_change_what_is_quoted(tokenizer):
    made = framed(tokenizer, "{{ messages[0].content[:8] | upper }}<|end|>", "<|end|>")
    assert decode(made, encode_prompt(made, "Is it? <|end|>")) == "IS IT? <|end|>"


def test_one_special_token_without_a_role_is_one(special):
    encoder = TextEncoder(special)
    assert encoder.is_token("<yes>", but=[])
    assert not encoder.is_token("<yes>", but=[special.convert_tokens_to_ids("<yes>")])
    for text in ("<s>", special.eos_token, "<yes><no>", "<yes> ", "yes", ""):
        assert not encoder.is_token(text, but=[])


class OfMistralCommon(PreTrainedTokenizerBase):
    """A tokenizer with what `transformers.MistralCommonBackend` lacks."""

    def added_tokens_decoder(self):
        raise NotImplementedError


def test_a_tokenizer_that_reads_no_chat_template_is_refused():
    message = (
        "tokenizer: expected one of transformers' own, .* got OfMistralCommon; .*_format=False"
    )
    with pytest.raises(ValueError, match=message):
        TextEncoder(OfMistralCommon())


def test_a_text_is_encoded_once_behind_what_was_before(special, monkeypatch):
    """A check of ten thousand rows before a run would take twice as long."""
    encoder, encoded = TextEncoder(special), []
    encode = special.encode

    def recorded(text, **options):
        encoded.append(text)
        return encode(text, **options)

    monkeypatch.setattr(special, "encode", recorded)
    for number in ("5", "12"):
        assert encoder.after(".", f" {number}") == encode(f". {number}")[2:]
        assert not encoder.is_token(number, but=[])
    assert encoded == [".", ". 5", ". 12"]
    # What stands before is read as a special token, then as text.
    encoder.after("<yes>", " 5", special=True)
    of_text = TextEncoder(special).after("<yes>", "<no> 5")
    assert encoder.after("<yes>", "<no> 5") == of_text

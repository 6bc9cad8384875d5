from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latro.rollout import AnswerJoin, Sample, decode, eos_token_ids

TEMPLATE = "The answer is"


@pytest.fixture
def join(tokenizer):
    return AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])


def test_join_after_the_template_keeps_the_sampled_ids(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    # Cut letter by letter, as a policy may; the ids are kept, not tokenised again.
    sampled = [i for c in " 2+3=5. The answer is" for i in tokenizer.encode(c)]
    rollout = join(prompt, Sample([*sampled, *tokenizer.encode(" 6")]), "5")
    assert rollout.sampled_ids == sampled
    assert rollout.finished
    assert decode(tokenizer, rollout.rationale_ids) == " 2+3=5. "
    assert decode(tokenizer, rollout.answer_ids) == "The answer is 5<|endoftext|>"
    assert rollout.input_ids + rollout.answer_ids[-1:] == (
        prompt + sampled + tokenizer.encode(" 5") + [tokenizer.eos_token_id]
    )


def test_join_after_the_end_token_scores_it_but_does_not_read_it(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    text = tokenizer.encode(" 2+3=5.")
    rollout = join(prompt, Sample([*text, tokenizer.eos_token_id]), "5")
    assert rollout.sampled_ids == [*text, tokenizer.eos_token_id]
    assert rollout.finished
    assert rollout.rationale_ids == text
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3=5. The answer is 5"


def test_join_at_the_length_limit(tokenizer, join):
    rollout = join(tokenizer.encode("How many?"), Sample(tokenizer.encode(" 2+3")), "5")
    assert not rollout.finished
    assert rollout.answer_start == len(rollout.sampled_ids)
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3 The answer is 5"


@pytest.mark.parametrize(("prompt", "joint"), [("How many?", " "), ("How many?\n", "")])
def test_an_empty_rationale_is_scored(tokenizer, join, prompt, joint):
    eos = tokenizer.eos_token_id
    rollout = join(tokenizer.encode(prompt), Sample([eos]), "5")
    assert rollout.finished
    assert rollout.rationale_ids == []
    assert rollout.sampled_ids == [eos]
    assert decode(tokenizer, rollout.input_ids) == f"{prompt}{joint}The answer is 5"


def test_a_tokenizer_without_an_end_token_ends_answers_with_the_models(tiny, tokenizer):
    model = tiny()
    eos = tokenizer.eos_token_id
    tokenizer.eos_token = None
    try:
        assert eos_token_ids(model, tokenizer) == [eos]
        model.generation_config.eos_token_id = [eos, 5]
        assert eos_token_ids(model, tokenizer) == [eos, 5]
        assert AnswerJoin(tokenizer, TEMPLATE, [eos])([7], Sample([8]), "5").answer_ids[-1] == eos
        bare = AnswerJoin(tokenizer, TEMPLATE, [])([7], Sample([8]), "5")
        assert decode(tokenizer, bare.answer_ids).endswith("is 5")
    finally:
        tokenizer.eos_token = "<|endoftext|>"


@given(text=st.text(alphabet="Tom has59=.+é ", max_size=40), answer=st.integers(0, 10**6))
def test_any_rationale_reads_on_in_its_answer(tokenizer_text, text, answer):
    tokenizer, join = tokenizer_text
    rollout = join(tokenizer.encode("How?"), Sample(tokenizer.encode(text)), str(answer))
    read = decode(tokenizer, rollout.input_ids)
    space = "" if text[-1:].isspace() else " "
    assert read == f"How?{text}{space}The answer is {answer}"


@pytest.fixture(scope="session")
def tokenizer_text(tokenizer):
    return tokenizer, AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])


def spelt(join, prompt, sampled, answer):
    """The text of the answer's own tokens, and how many they are."""
    tokenizer = join.tokenizer
    rollout = join(tokenizer.encode(prompt), Sample(tokenizer.encode(sampled)), answer)
    ids = [rollout.answer_ids[j] for j in rollout.own_rows]
    assert rollout.own_end == len(rollout.answer_ids) - len(join.end_ids)
    return decode(tokenizer, ids), len(ids)


@pytest.mark.parametrize("sampled", ["", " 2+3=5.", " 2+3=5. The answer is", " so:\n"])
@pytest.mark.parametrize("answer", ["5", "1234567", "is 5", "The answer is 5", "été", "5 5"])
def test_the_answers_own_tokens(join, sampled, answer):
    """Neither the template's nor the end token, whatever ended the rationale."""
    text, _ = spelt(join, "How many?", sampled, answer)
    # The space before it belongs to the answer where one token holds both.
    assert text.removeprefix(" ") == answer
    rollout = join.written(join.tokenizer.encode("How many?"), sampled, answer)
    own = [rollout.answer_ids[j] for j in rollout.own_rows]
    assert decode(join.tokenizer, own) == text


def trained(pre_tokenizer, decoder, normalizer=None):
    """A BPE tokenizer of a few statements of answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "▁"],
        show_progress=False,
    )
    texts = [f"How many? The answer is {a}{b}." for a in (4, 5, 6) for b in range(10)] * 3
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")


def test_a_space_of_its_own_is_not_the_answers():
    """As Llama 2 and Mistral spell digits: a space, then each digit."""
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    tokenizer = trained(pieces, decoders.Metaspace())
    join = AnswerJoin(tokenizer, TEMPLATE, [])
    assert tokenizer.convert_ids_to_tokens(join._ids_after(TEMPLATE, " 47")) == ["▁", "4", "7"]
    assert spelt(join, "How many?", " so.", "47") == ("47", 2)
    assert spelt(join, "How many?", " so. The answer is", "47") == ("47", 2)


def test_a_token_over_the_border_is_the_answers():
    """Where tokens run over words, as in SuperBPE."""
    whole = pre_tokenizers.Split(Regex("(?<=[?]) "), "isolated")
    pieces = pre_tokenizers.Sequence([whole, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = trained(pieces, decoders.ByteLevel())
    join = AnswerJoin(tokenizer, TEMPLATE, [])
    text, count = spelt(join, "How many?", " so", "47.")
    assert text.endswith("is 47.")
    assert len(text) > len(" 47.")
    tokens = [decode(tokenizer, [i]) for i in join([5], Sample([]), "47.").answer_ids]
    assert text == "".join(tokens[-1 - count : -1])
    assert not "".join(tokens[-count:-1]).endswith("47.")


def test_an_answer_that_the_tokenizer_normalises():
    pieces = pre_tokenizers.ByteLevel(False)
    tokenizer = trained(
        pieces,
        decoders.ByteLevel(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    )
    join = AnswerJoin(tokenizer, "the answer is", [])
    assert spelt(join, "How many?", " so.", "X² + ½") == ("x2 + 1⁄2", 10)

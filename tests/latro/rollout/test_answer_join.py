from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from latro.engines.transformers import TransformersEngine
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample, decode, eos_token_ids
from tests.latro import frames

TEMPLATE = "The answer is"


@pytest.fixture
def join(tokenizer):
    return AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])


def test_join_after_the_template_keeps_the_sampled_ids(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    # A policy may sample letter by letter; the ids are kept, not tokenized again.
    sampled = [i for c in " 2+3=5. The answer is" for i in tokenizer.encode(c)]
    rollout = join(prompt, Sample([*sampled, *tokenizer.encode(" 6")]), "5")
    assert rollout.sampled_ids == sampled
    assert rollout.finished
    assert decode(tokenizer, rollout.rationale_ids) == " 2+3=5. "
    assert decode(tokenizer, rollout.answer_ids) == f"The answer is 5{tokenizer.eos_token}"
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


def test_a_long_rationale_that_ends_with_the_template_is_read_few_times(
    tokenizer, join, monkeypatch
):
    """A thousand tokens take a millisecond to decode, and an update joins thousands of them."""
    ids = [*tokenizer.encode(" 2+3=5." * 200), *tokenizer.encode(" The answer is")]
    long, decode_ids = [], tokenizer.decode

    def recorded(ids, **options):
        long.append(len(ids) > 100)
        return decode_ids(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", recorded)
    assert join(tokenizer.encode("How many?"), Sample(ids), "5").sampled_ids == ids
    assert sum(long) <= 3


def test_an_answer_is_encoded_once_behind_the_same_words(tokenizer, join, monkeypatch):
    """An update joins each answer to K rationales, and a check before a run to every prompt."""
    encoded, encode = [], tokenizer.encode

    def recorded(text, **options):
        encoded.append(text)
        return encode(text, **options)

    prompt, ids = tokenizer.encode("How many?"), tokenizer.encode(" 2+3=5.")
    stated = [*ids, *tokenizer.encode(" The answer is")]
    monkeypatch.setattr(tokenizer, "encode", recorded)
    for sampled in (ids, stated):
        first = join(prompt, Sample(sampled), "5")
        before = len(encoded)
        again = join(prompt, Sample(sampled), "5")
        assert len(encoded) == before
        assert again == first
        again.answer_ids.append(0)
        assert join(prompt, Sample(sampled), "5") == first


@pytest.mark.parametrize("answer", [" 5", "5\n", "\t 5 "])
def test_white_space_around_an_answer_is_no_part_of_it(tokenizer, join, answer):
    prompt, sample = tokenizer.encode("How many?"), Sample(tokenizer.encode(" 2+3=5."))
    assert join(prompt, sample, answer) == join(prompt, sample, "5")


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
    eos, spelling = tokenizer.eos_token_id, tokenizer.eos_token
    tokenizer.eos_token = None
    try:
        assert eos_token_ids(model, tokenizer) == [eos]
        model.generation_config.eos_token_id = [eos, 5]
        assert eos_token_ids(model, tokenizer) == [eos, 5]
        assert AnswerJoin(tokenizer, TEMPLATE, [eos])([7], Sample([8]), "5").answer_ids[-1] == eos
        bare = AnswerJoin(tokenizer, TEMPLATE, [])([7], Sample([8]), "5")
        assert decode(tokenizer, bare.answer_ids).endswith("is 5")
    finally:
        tokenizer.eos_token = spelling


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
    """Return the text and the number of the answer's own tokens."""
    tokenizer = join.tokenizer
    rollout = join(tokenizer.encode(prompt), Sample(tokenizer.encode(sampled)), answer)
    ids = [rollout.answer_ids[j] for j in rollout.own_rows]
    assert rollout.own_end == len(rollout.answer_ids) - len(join.end_ids)
    return decode(tokenizer, ids), len(ids)


@pytest.mark.parametrize("sampled", ["", " 2+3=5.", " 2+3=5. The answer is", " so:\n"])
@pytest.mark.parametrize("answer", ["5", "1234567", "is 5", "The answer is 5", "été", "5 5"])
def test_the_answers_own_tokens(join, sampled, answer):
    """They exclude the template's tokens and the end token, however the rationale ended."""
    text, _ = spelt(join, "How many?", sampled, answer)
    # A space in one token with the answer belongs to it.
    assert text.removeprefix(" ") == answer
    rollout = join.written(join.tokenizer.encode("How many?"), sampled, answer)
    own = [rollout.answer_ids[j] for j in rollout.own_rows]
    assert decode(join.tokenizer, own) == text


def trained(pre_tokenizer, decoder, normalizer=None):
    """Return a BPE tokenizer trained on a few statements of answers."""
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
    """Llama 2 and Mistral spell digits so: a space, then each digit."""
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    tokenizer = trained(pieces, decoders.Metaspace())
    join = AnswerJoin(tokenizer, TEMPLATE, [])
    assert tokenizer.convert_ids_to_tokens(join._ids_after(TEMPLATE, " 47")) == ["▁", "4", "7"]
    assert spelt(join, "How many?", " so.", "47") == ("47", 2)
    assert spelt(join, "How many?", " so. The answer is", "47") == ("47", 2)


def test_a_token_over_the_border_is_the_answers():
    """Tokens may span words, as in SuperBPE."""
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


def letters_of(tokenizer, text):
    """Return the ids of a text letter by letter, as a policy may sample it."""
    return [i for c in text for i in tokenizer.encode(c)]


@pytest.fixture
def whole_words():
    """Return a tokenizer with one token per word, and some tokens that span words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    texts = ["The answer is 5. The answer isn't 6. Answers Answering Answer: 5"] * 200
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    made.add_tokens([": 5", ":\n", " is so", "####5", "Answer is: 6"])
    return made


INSIDE = [
    ("The answer is", "Hmm. The answer isn't 6."),
    ("The answer is", "The answer is't 6"),
    ("The answer is ", "The answer isn't 6."),
    ("The answer", "The answers are 5."),
    ("Answer", "Answering Answers"),
    ("Answer:", "canswer: 5"),
    ("Answer: ", "A canswer: 5"),
    ("The answer is", "The answer isé"),
]


@pytest.mark.parametrize("cut", ["words", "letters"])
@pytest.mark.parametrize(("template", "text"), INSIDE)
def test_a_template_inside_a_word_is_none(whole_words, template, text, cut):
    join = AnswerJoin(whole_words, template, [whole_words.eos_token_id])
    ids = whole_words.encode(text) if cut == "words" else letters_of(whole_words, text)
    rollout = join([0], Sample(ids), "5")
    assert rollout.sampled_ids == rollout.rationale_ids == ids
    assert not rollout.finished
    assert decode(whole_words, rollout.answer_ids) == f" {template.strip()} 5<eos>"


@pytest.mark.parametrize("cut", ["words", "letters"])
@pytest.mark.parametrize(
    ("template", "text", "kept"),
    [
        ("The answer is", "So. The answer is 6. So", "So. The answer is"),
        ("The answer is", "so the answer IS: 6", "so the answer IS"),
        ("The answer is ", "So. The answer is 6", "So. The answer is"),
        ("The answer is", "The answer isn't 6. The answer is", "The answer isn't 6. The answer is"),
        ("The answer is", "The answer is“5”", "The answer is"),
        ("Answer:", "Answer:5", "Answer:"),
        ("Answer: ", "So. Answer:6 So", "So. Answer:"),
        ("####", "So.\n#### 6", "So.\n####"),
        ("答案是", "所以答案是6", "所以答案是"),
    ],
)
def test_a_statement_ends_a_rationale_with_the_templates_own_tokens(
    whole_words, template, text, kept, cut
):
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(whole_words.backend_tokenizer.to_str()),
        eos_token="<eos>",
    )
    join = AnswerJoin(made, template, [made.eos_token_id])
    ids = made.encode(text) if cut == "words" else letters_of(made, text)
    rollout = join([0], Sample(ids, [0.0] * len(ids)), "5")
    # The token that shows the end of the word does not belong to z.
    if "6" in text and template != "####":
        assert decode(made, rollout.sampled_ids) == kept
    assert rollout.sampled_ids == ids[: len(rollout.sampled_ids)]
    assert len(rollout.sampled_logp) == len(rollout.sampled_ids)
    assert rollout.finished
    spelled = decode(made, rollout.answer_ids).strip()
    assert spelled.casefold() == f"{template.strip()} 5<eos>".casefold()
    assert_rows_stand_in_what_is_read(rollout)


def assert_rows_stand_in_what_is_read(rollout):
    """Check that each token of z but the last is read where the next is predicted."""
    read = rollout.sampled_ids[:-1]
    assert rollout.branch_ids[: len(read)] == read


@pytest.mark.parametrize(
    ("template", "tokens", "z", "y"),
    [
        ("Answer:", ["Answer", ": 5", " pens"], "Answer: 5", "Answer: 7<eos>"),
        ("Answer:", ["Answer", ":\n", "5"], "Answer:\n", "Answer: 7<eos>"),
        ("The answer is", ["The", " answer", " is so", "!"], "The answer is so", None),
        ("####", ["So.", "####5", "!"], "So.####5", "#### 7<eos>"),
        ("Answer is", ["So. ", "Answer is: 6"], "So. Answer is: 6", "Answer is 7<eos>"),
    ],
)
def test_a_token_over_the_templates_end_ends_a_rationale_and_is_not_read(
    whole_words, template, tokens, z, y
):
    ids = [i for token in tokens for i in whole_words.encode(token)]
    rollout = AnswerJoin(whole_words, template, [])([0], Sample(ids), "7")
    assert decode(whole_words, rollout.sampled_ids) == z
    assert decode(whole_words, rollout.answer_ids) == (y or "The answer is 7<eos>")
    assert rollout.finished
    assert rollout.sampled_ids[-1] not in rollout.branch_ids
    assert_rows_stand_in_what_is_read(rollout)


def test_a_later_statement_can_be_the_one(whole_words):
    join = AnswerJoin(whole_words, TEMPLATE, [])
    ids = whole_words.encode("I hope the answer is right. The answer is 5")
    rollouts = [join([0], Sample(ids), "7", statement=index) for index in (0, 1, 2)]
    texts = [decode(whole_words, r.rationale_ids).rstrip() for r in rollouts]
    assert texts == [
        "I hope",
        "I hope the answer is right.",
        "I hope the answer is right. The answer is 5",
    ]
    assert [r.finished for r in rollouts] == [True, True, False]


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        (frames.GRANITE, ["<|start_of_role|>", "<|end_of_role|>"]),
        (frames.ZEPHYR, ["<|user|>", "<|assistant|>"]),
        (frames.MISTRAL, ["[INST]", "[/INST]"]),
        (frames.CHATML, ["<|im_start|>", "<|im_end|>"]),
        (frames.PHI, ["<|user|>", "<|assistant|>", "<|end|>"]),
        (frames.NOTHING, ["<|user|>", "<|assistant|>"]),
    ],
)
@pytest.mark.parametrize("rationale", ["Tom has 2+3=5.", ""])
@pytest.mark.parametrize("absorbs", [False, True], ids=["", "absorbs"])
def test_words_begin_behind_a_prompt_as_in_the_chat_template(
    tokenizer, template, tokens, rationale, absorbs
):
    added = [AddedToken(token, rstrip=absorbs, special=True) for token in tokens]
    made = frames.framed(tokenizer, template, *added)
    join = AnswerJoin(made, TEMPLATE, [made.eos_token_id])
    question = [{"role": "user", "content": "How many?"}]
    prompt = encode_prompt(made, question)
    written = f"{rationale} The answer is 5".strip()
    expected = made.apply_chat_template(
        [*question, {"role": "assistant", "content": written}], return_dict=False
    )
    if rationale:
        rollout = join.written(prompt, rationale, "5")
    else:
        rollout = join(prompt, Sample([made.eos_token_id]), "5")
    if template == frames.NOTHING:
        # Its prompts end before a role, which no words can stand for.
        assert decode(made, rollout.input_ids) == f"<|user|>How many? {written}"
    else:
        assert rollout.input_ids == expected[: len(rollout.input_ids)]


@pytest.mark.parametrize(
    ("template", "absorbs"), [(frames.PHI, True), (frames.GRANITE, False), (frames.GRANITE, True)]
)
def test_words_begin_with_the_space_that_a_tokenizer_puts_behind_special_tokens(template, absorbs):
    """As those of Llama 2 and Phi-3 do, which put one before every text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaced = trained(
        pre_tokenizers.Split("▁", "merged_with_next"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        normalizer,
    )
    tokens = ["<|user|>", "<|assistant|>", "<|end|>", "<|start_of_role|>", "<|end_of_role|>"]
    added = [AddedToken(token, rstrip=absorbs, special=True, normalized=False) for token in tokens]
    made = frames.framed(spaced, template, *added)
    join = AnswerJoin(made, TEMPLATE, [made.eos_token_id])
    question = [{"role": "user", "content": "The"}]
    rollout = join(encode_prompt(made, question), Sample([made.eos_token_id]), "5")
    expected = made.apply_chat_template(
        [*question, {"role": "assistant", "content": "The answer is 5"}], return_dict=False
    )
    assert rollout.input_ids == expected[: len(rollout.input_ids)]


def test_a_prompt_outside_of_the_frame_has_a_space_behind_it(tokenizer):
    """As TRL's plain prompts stand, whatever chat template the tokenizer has."""
    for template in (frames.GRANITE, frames.MISTRAL.replace("' ' + m", "m")):
        made = frames.framed(tokenizer, template, "<|start_of_role|>", "<|end_of_role|>")
        join = AnswerJoin(made, TEMPLATE, [made.eos_token_id])
        rollout = join(made.encode("How many?"), Sample([made.eos_token_id]), "5")
        assert decode(made, rollout.input_ids) == "How many? The answer is 5"


@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        (frames.PHI, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
        (frames.GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
        (frames.LLAMA_3, ["<|eot_id|>"], "<|eot_id|>"),
        (frames.CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
        (frames.MISTRAL, [], None),
        (frames.PLAIN, [], None),
        (None, ["<|im_end|>"], None),
    ],
)
def test_an_answer_ends_as_an_assistants_turn_does(tiny, tokenizer, template, tokens, end):
    made = frames.framed(tokenizer, template, *tokens)
    model = tiny(vocab_size=len(made))
    eos = made.eos_token_id
    # Without a token that ends a turn, the tokenizer's own ends it.
    end_id = eos if end is None else made.convert_tokens_to_ids(end)
    ends = eos_token_ids(model, made)
    assert ends == sorted({eos, end_id})
    # The result is the same whether or not it is given all end tokens.
    for join in (AnswerJoin(made, TEMPLATE, ends), AnswerJoin(made, TEMPLATE, [eos])):
        for sample in ([7], [7, end_id], [7, eos], made.encode(" so. The answer is")):
            rollout = join([5], Sample(sample), "5")
            assert rollout.answer_ids[-1] == end_id
            assert end_id not in rollout.answer_ids[:-1]
            assert rollout.finished is (len(sample) > 1)
        assert join.written([5], "So it is.", "5").answer_ids[-1] == end_id


# A random model of many tokens hardly ever samples one of two.
@pytest.mark.parametrize("tokenizer", ["tiny"], indirect=True)
def test_samples_end_at_the_end_of_a_turn(tiny, tokenizer):
    made = frames.framed(tokenizer, frames.PHI, "<|user|>", "<|assistant|>", "<|end|>")
    end, eos = made.convert_tokens_to_ids("<|end|>"), made.eos_token_id
    engine = TransformersEngine(tiny(vocab_size=len(made)), made)
    (group,) = engine.generate(
        [[5, 6, 7]], num_samples=64, max_new_tokens=128, temperature=1.0, seeds=[0]
    )
    last = {sample.ids[-1] for sample in group if len(sample.ids) < 128}
    assert last == {end, eos}
    assert not any({end, eos} & set(sample.ids[:-1]) for sample in group)


@pytest.fixture
def labels(tokenizer):
    return frames.framed(tokenizer, None, "<yes>", "<no>", "<pad>")


def test_an_answer_that_is_a_special_token_is_that_token(labels):
    labels.pad_token = "<pad>"
    join = AnswerJoin(labels, TEMPLATE, [labels.eos_token_id])
    yes, pad = labels.convert_tokens_to_ids(["<yes>", "<pad>"])
    for sample in (Sample([7]), Sample(labels.encode(" so. The answer is"))):
        rollout = join([5], sample, "<yes>")
        assert rollout.answer_ids[-2:] == [yes, labels.eos_token_id]
        assert [rollout.answer_ids[j] for j in rollout.own_rows] == [yes]
        for text in ("<yes> or <no>", "<|endoftext|>", "<pad>", "<s>"):
            ids = join([5], sample, text).answer_ids
            assert not set(ids[:-1]) & {yes, pad, labels.eos_token_id, labels.bos_token_id}
            assert decode(labels, ids).endswith(f"he answer is {text}{labels.eos_token}")


def test_what_spells_a_special_token_in_a_rationale_is_text(labels):
    join = AnswerJoin(labels, TEMPLATE, [labels.eos_token_id])
    rollout = join.written([5], "<|endoftext|> means the end, <yes>.", "5")
    assert not set(rollout.rationale_ids) & set(labels.all_special_ids)
    assert decode(labels, rollout.rationale_ids).strip() == "<|endoftext|> means the end, <yes>."


def test_a_template_may_be_a_special_token(labels):
    join = AnswerJoin(labels, "<no>", [labels.eos_token_id])
    no = labels.convert_tokens_to_ids("<no>")
    for sample in ([7], [7, no, 8], [7, labels.eos_token_id]):
        rollout = join([5], Sample(sample), "<yes> or 5")
        assert rollout.answer_ids.count(no) == 1
        assert labels.convert_tokens_to_ids("<yes>") not in rollout.answer_ids
    assert rollout.finished


def test_ends_and_padding_are_taken_off_the_end_alone(labels):
    labels.pad_token = "<pad>"
    join = AnswerJoin(labels, TEMPLATE, [labels.eos_token_id])
    pad, eos, yes = labels.pad_token_id, labels.eos_token_id, labels.convert_tokens_to_ids("<yes>")
    assert join.without_ends([7, pad, yes, eos, 8, yes, eos, pad, pad]) == [
        7,
        pad,
        yes,
        eos,
        8,
        yes,
    ]
    assert join.without_ends([eos, pad]) == join.without_ends([]) == []

"""The small model that ships, loaded as users do: by the Auto classes, from its folder."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import latro
from latro.tasks import get_task
from studies.replicate.pretrain import TASKS, Arguments, generate_documents

ASSETS = Path(latro.__file__).parent / "assets"
SMALL = ASSETS / "small"
TASK = get_task("arithmetic")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SMALL).eval()


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in SMALL.iterdir()) < 4_000_000


def test_the_model_is_of_the_size_it_says(model, tokenizer):
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 903_936
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    "text",
    [
        "Tom has 10 pens. Tom loses 2. How many? 10 - 2 = 8. The answer is 8",
        " leading, trailing and  double spaces \n\n\ttoo ",
        "Größe: 1,234.50 € \u2212 naïve 数 🙂",
        "don't . Stop !",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_and_frequent_words_are_one_token(tokenizer):
    assert tokenizer.tokenize(" 1205") == ["Ġ", "1", "2", "0", "5"]
    assert tokenizer.tokenize(" The answer is") == ["ĠThe", "Ġanswer", "Ġis"]


def test_an_answer_tokenizes_alike_alone_and_in_a_document(tokenizer):
    document = tokenizer("How many? 4 + 8 = 12. The answer is 12<eos>").input_ids
    answer = tokenizer(" The answer is 12<eos>").input_ids
    assert document[-len(answer) :] == answer
    assert answer[-1] == tokenizer.eos_token_id


def test_the_base_model_reasons_now_and_then(model, tokenizer):
    """Broken weights would score nothing, and a solved task would leave nothing to learn."""
    rows = list(TASK.load("validation", num_examples=100))
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = model.generate(
        **batch, do_sample=True, top_k=0, max_new_tokens=80, pad_token_id=tokenizer.eos_token_id
    )
    texts = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert sum(TASK.answer_template in text for text in texts) >= 95
    assert 20 <= sum(" = " in text for text in texts) <= 70
    assert 20 <= sum(map(TASK.grade, texts, rows)) <= 70


def test_no_held_out_problem_is_in_the_pre_training_text():
    settings = Arguments(output_dir=SMALL)
    documents = generate_documents(TASKS[settings.task], settings.seed)
    seen = {prompt for prompt, _ in islice(documents, settings.steps * settings.batch_size)}
    assert len(seen) > 100_000
    for split in ("validation", "test"):
        for seed in range(5):
            assert seen.isdisjoint(TASK.load(split, seed=seed)["prompt"])


def test_the_default_settings_name_the_task_of_the_model():
    settings = yaml.safe_load((ASSETS / "default.yaml").read_text(encoding="utf-8"))
    assert settings["dataset_name"] == TASK.name
    assert "model_name_or_path" not in settings

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas
import pytest
from datasets import load_dataset

from latro.engines.transformers import seed_of
from latro.evaluate import EvaluateArguments, evaluate, main
from latro.run.folder import lock_of, locked
from latro.tasks import TASKS
from tests.latro.fake_vllm import sample_for_real

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
FEW = ("--num_eval_examples", "5", "--num_samples", "2", "--max_completion_length", "8")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "evaluation.json"


def test_the_command_line(output, capsys):
    result = evaluate([*FEW, "--majority", "1", "2", "--output", str(output)])
    assert json.loads(output.read_text()) == result
    assert {"accuracy_greedy", "accuracy_sampled", "maj@1", "maj@2", "answer_logp"} <= set(
        result["metrics"]
    )
    for name, (low, high) in result["intervals"].items():
        assert low <= result["metrics"][name] <= high
    assert result["problems"] == 5
    assert result["seconds"] > 0
    printed = capsys.readouterr().out
    assert "maj@2" in printed
    assert "95 % interval" in printed


def test_the_lines_open_in_datasets_and_in_pandas(output, tmp_path):
    result = evaluate([*FEW, "--majority", "2", "--output", str(output)])
    lines = str(output.with_suffix(".jsonl"))
    rows = load_dataset("json", data_files=lines, split="train", cache_dir=str(tmp_path / "cache"))
    assert {"index", "prompt", "answer", "greedy", "sampled"} == set(rows.column_names)
    frame = pandas.read_json(lines, lines=True)
    assert list(frame["index"]) == list(rows["index"]) == list(range(5))
    greedy = frame["greedy"].str[0].str["correct"].mean()
    assert greedy == result["metrics"]["accuracy_greedy"]
    completion = rows[0]["sampled"][1]
    assert {"text", "predicted", "correct", "rationale_tokens", "answer_logp"} <= set(completion)


def test_started_again_it_goes_on_from_its_lines(output, monkeypatch):
    argv = [*FEW, "--batch_size", "2", "--majority", "2", "--output", str(output)]
    whole = evaluate(argv)
    lines = output.with_suffix(".jsonl")
    there = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(there[:2]) + there[2][:40])
    output.unlink()
    assert evaluate(argv)["metrics"] == whole["metrics"]
    assert lines.read_bytes() == b"".join(there)
    # Votes are counted again from the lines, without generating anything.
    monkeypatch.delattr("latro.evaluation.accuracy.TransformersEngine.generate")
    argv[argv.index("--majority") + 1] = "1"
    assert evaluate(argv)["metrics"]["maj@1"] == whole["metrics"]["accuracy_sampled"]


def test_a_vllm_server_gives_the_same_evaluation(output, tmp_path, fake, small_tokenizer):
    own = [*FEW, "--batch_size", "2", "--majority", "2"]
    here = evaluate([*own, "--output", str(tmp_path / "here.json")])
    fake.tokenizer = small_tokenizer
    sample_for_real(fake, [seed_of(42, index) for index in range(5)])
    argv = [*own, "--rollout_engine", "vllm", "--vllm_url", fake.url, "--output", str(output)]
    served = evaluate(argv)
    assert served["metrics"] == pytest.approx(here["metrics"], rel=1e-5)
    lines = output.with_suffix(".jsonl")
    records = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (lines, tmp_path / "here.jsonl")
    ]
    for ours, theirs in zip(*records, strict=True):
        for mode in ("greedy", "sampled"):
            assert [c["text"] for c in ours[mode]] == [c["text"] for c in theirs[mode]]
    bodies = fake.of("/v1/completions")
    assert {(body["n"], body["temperature"]) for body in bodies} == {(1, 0.0), (2, 1.0)}
    # Weights pass through a folder beside the output and are deleted there.
    assert list((output.parent / "vllm_weights").iterdir()) == []
    # An evaluation resumes from its own lines, and not from those of another engine.
    kept = lines.read_bytes()
    lines.write_bytes(b"".join(kept.splitlines(keepends=True)[:3]))
    output.unlink()
    fake.asked.clear()
    assert evaluate(argv)["metrics"] == served["metrics"]
    assert lines.read_bytes() == kept
    assert len(fake.of("/v1/completions")) == 2 * 3
    with pytest.raises(ValueError, match=r"settings\.rollout_engine 'vllm' there, 'transformers'"):
        evaluate([*own, "--output", str(output)])


def test_a_server_without_the_model_s_tokenizer_is_refused(output, fake):
    with pytest.raises(ValueError, match=r"^vllm_url: .* whose tokenizer is not the policy's"):
        evaluate(
            [*FEW, "--rollout_engine", "vllm", "--vllm_url", fake.url, "--output", str(output)]
        )
    assert not output.exists()


def test_processes_share_the_problems_and_go_on_from_lines(output, tmp_path, warm):
    argv = [*FEW, "--num_eval_examples", "7", "--majority", "2"]
    alone = evaluate([*argv, "--batch_size", "4", "--output", str(tmp_path / "alone.json")])
    output.parent.mkdir()
    for suffix in (".jsonl", ".settings.json"):
        there = (tmp_path / "alone.json").with_suffix(suffix).read_bytes()
        # Five lines are one batch of both processes and one line of the next batch.
        kept = there if suffix != ".jsonl" else b"".join(there.splitlines(keepends=True)[:5])
        output.with_suffix(suffix).write_bytes(kept)
    argv += ["--batch_size", "2", "--output", str(output)]
    done = warm.run_together("latro.evaluate", argv, tmp_path / "printed", processes=2)
    # Only one process prints.
    assert done.stdout.count("95 % interval") == 1
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics == pytest.approx(alone["metrics"], rel=1e-5)
    lines = output.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(7))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "7"), "settings.seed 42 there, 7 here"),
        (("--num_shots", "1"), "settings.num_shots 0 there, 1 here"),
        (("--eval_split", "validation"), "data.rows"),
    ],
)
def test_lines_of_another_evaluation_are_kept(output, more, message):
    argv = [*FEW, "--num_eval_examples", "2", "--majority", "2", "--output", str(output)]
    evaluate(argv)
    before = output.with_suffix(".jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        evaluate([*argv, *more])
    assert output.with_suffix(".jsonl").read_bytes() == before
    assert evaluate([*argv, *more, "--overwrite"])["problems"] == 2


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("config.json", "model config: rms_norm_eps", 0.01),
        ("config.json", "model config: max_position_embeddings", 300),
        ("generation_config.json", "ends", 7),
    ],
)
def test_lines_of_another_model_at_the_same_path_are_kept(
    output, tiny, tokenizer, tmp_path, file, name, value
):
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    argv = ["--model_name_or_path", str(folder), *FEW, "--output", str(output)]
    evaluate(argv)
    lines = output.with_suffix(".jsonl")
    before = lines.read_bytes()
    config = json.loads((folder / file).read_text())
    key = {"ends": "eos_token_id"}.get(name, name.rpartition(" ")[2])
    (folder / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"is of another evaluation: model\.{name} "):
        evaluate(argv)
    assert lines.read_bytes() == before


def test_an_impossible_answer_is_null_and_no_error(output, monkeypatch):
    argv = [*FEW, "--num_eval_examples", "4", "--batch_size", "2", "--output", str(output)]
    batches = []

    def impossible(scorer, rollouts, token_budget):
        batches.append(len(rollouts))
        return [-math.inf] * len(rollouts)

    monkeypatch.setattr("latro.evaluation.accuracy.answer_logp", impossible)
    metrics = evaluate(argv)["metrics"]
    assert metrics["answer_logp"] == -math.inf
    assert json.loads(output.read_text())["metrics"]["answer_logp"] is None
    lines = output.with_suffix(".jsonl")
    whole = lines.read_bytes()
    assert json.loads(whole.splitlines()[0])["greedy"][0]["answer_logp"] is None
    lines.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    before = len(batches)
    assert evaluate(argv)["metrics"] == metrics
    assert lines.read_bytes() == whole
    assert len(batches) - before == before / 2


def test_a_killed_evaluation_leaves_no_result_of_the_one_before(output, monkeypatch):
    argv = [*FEW, "--num_eval_examples", "2", "--output", str(output)]
    evaluate(argv)

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate([*argv, "--seed", "7", "--overwrite"])
    assert not output.exists()


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task(output, name, shots):
    """Tasks with files use the real ones."""
    data = []
    if name in ("gsm8k", "arc_challenge"):
        if not (REAL_DATA / name).is_dir():
            pytest.skip(f"the files of {name} are not at ../shared/data/{name}")
        data = ["--dataset_path", str(REAL_DATA / name)]
    result = evaluate(
        [
            *("--dataset_name", name, *data, "--num_shots", str(shots), "--num_samples", "2"),
            *("--num_eval_examples", "2", "--majority", "1", "2", "--max_completion_length", "4"),
            *("--output", str(output)),
        ]
    )
    assert result["problems"] == 2
    assert len(result["examples"]) == shots
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_own_data_with_messages_and_a_chat_template(output, tiny, tokenizer, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "data").mkdir()
    for split, numbers in {"train": range(9), "test": range(20, 22)}.items():
        rows = [
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What is {n} and 1?"},
                ],
                "answer": str(n + 1),
                "rationale": f"{n}+1={n + 1}.",
            }
            for n in numbers
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    result = evaluate(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--num_shots", "2", *FEW),
            *("--dataset_name", str(tmp_path / "data"), "--majority", "2", "--output", str(output)),
        ]
    )
    assert result["problems"] == 2
    assert len(result["examples"]) == 2
    lines = output.with_suffix(".jsonl").read_text().splitlines()
    asked = {json.loads(line)["prompt"][1]["content"] for line in lines}
    assert asked == {"What is 20 and 1?", "What is 21 and 1?"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_samples", "2", "--majority", "3"), "k from 1 to num_samples = 2"),
        (("--max_completion_length", "100000"), "lower max_completion_length"),
        (("--eval_split", "tset"), "tset"),
        (("--num_shots", "-1"), "num_shots: expected 0 or more, got -1"),
        (("--num_shots", "100000"), "num_shots: expected at most 10000"),
    ],
)
def test_a_bad_call_writes_nothing(output, argv, message):
    with pytest.raises(ValueError, match=message):
        evaluate(["--output", str(output), *argv])
    assert not output.parent.exists()


def test_a_file_that_no_evaluation_wrote_is_kept(output):
    output.parent.mkdir(exist_ok=True, parents=True)
    output.write_text("mine")
    for more in ((), ("--overwrite",)):
        with pytest.raises(ValueError, match=r"^output: .* is there without .*\.settings\.json"):
            evaluate([*FEW, "--output", str(output), *more])
    assert output.read_text() == "mine"


def test_two_evaluations_at_once_on_one_output(output):
    with (
        locked(lock_of(output), "output: it"),
        pytest.raises(ValueError, match=r"^output: .* is in use by process \d+ on .*; wait until"),
    ):
        evaluate([*FEW, "--output", str(output)])
    assert not output.exists()
    evaluate([*FEW, "--output", str(output)])
    assert sorted(p.name for p in output.parent.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["config.json", "x.json"])
def test_the_model_s_own_files_are_no_output(tiny, tokenizer, tmp_path, name):
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "x.settings.json").touch()
    before = (tmp_path / "config.json").read_bytes()
    argv = (*FEW, "--model_name_or_path", str(tmp_path), "--output", str(tmp_path / name))
    with pytest.raises(ValueError, match=r"^output: .* is a file of "):
        evaluate([*argv, "--overwrite"])
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_vote_is_of_all_samples_unless_it_is_said():
    assert EvaluateArguments(num_samples=4).majority == [4]
    assert EvaluateArguments(num_samples=0).majority == []
    assert EvaluateArguments(num_samples=4, majority=[2]).majority == [2]


@pytest.mark.parametrize(
    ("error", "message"),
    [(ValueError("split: bad"), "split: bad"), (ConnectionError("offline"), "offline")],
)
def test_an_error_is_one_line(monkeypatch, error, message):
    def failing():
        raise error

    monkeypatch.setattr("latro.evaluate.evaluate", failing)
    with pytest.raises(SystemExit, match=rf"^latro\.evaluate: {message}$"):
        main()

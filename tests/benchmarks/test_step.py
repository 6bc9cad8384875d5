from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.updates import measure
from benchmarks.updates.contenders import Ours, Trl
from benchmarks.updates.measure import MAKERS, Held, absent
from benchmarks.updates.problem import CPU, GPU, QUICK, StepProblem, stops_by_chance
from benchmarks.updates.published import Published, PublishedRecipe
from tests.latro.compiled import traced_only

pytestmark = pytest.mark.long
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        # The graph as torch traces it; generating code for it would take longer than all else.
        patch.setattr(torch, "compile", traced_only)
        arguments = ["--quick", "--compiled", "--device", "cpu", "--reps", "2"]
        step.main([*arguments, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "step.json").read_text())


def passes_of(name, tmp_path, problem):
    contender = MAKERS[name](problem, tmp_path)
    with contender.counted() as passes:
        contender.update(problem.groups())
    return passes


def test_files(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "step.json",
        "step.png",
        "step_scaling.png",
    ]
    for chart in out.glob("*.png"):
        assert chart.read_bytes().startswith(b"\x89PNG")


def test_rows_have_times_ratios_and_memory(result):
    present = [name for name in MAKERS if absent(name) is None]
    assert [row["contender"] for row in result["rows"]] == present
    assert len(result["cannot_run"]) == len(MAKERS) - len(present)
    ours = result["rows"][0]
    for row in result["rows"]:
        once = row["contender"] == PublishedRecipe.name
        assert list(row["times"]) == (["update"] if once else ["update", "step"])
        for phase in row["times"]:
            times = row["times"][phase]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["reps"] == 2
            expected = times["median"] / ours["times"][phase]["median"]
            assert row["ratio"][phase] == pytest.approx(expected)
        assert row["peak"] > 0
        prompts = QUICK.G * (QUICK.P if row is ours else QUICK.K * QUICK.P)
        uncounted = once or not MAKERS[row["contender"]].counts_steps
        assert row["prompt_tokens"] == (None if uncounted else prompts)
    assert ours["ratio"] == {"update": 1, "step": 1}


def test_the_published_gradient_is_ours(result):
    errors = {row["contender"]: row["gradient_error"] for row in result["rows"]}
    assert errors[Ours.name] is None
    for name in (Published.name, PublishedRecipe.name):
        assert 0 <= errors[name] < 1e-4


def test_scaling_varies_one_size_at_a_time(result):
    assert list(result["scaling"]) == ["K", "P", "R", "V"]
    keys = {"K": "K", "P": "P", "R": "rationale", "V": "V"}
    base = {**result["scaling"]["P"][2]["setting"]}
    for axis, rows in result["scaling"].items():
        settings = [row["setting"] for row in rows if row["contender"] == Ours.name]
        assert len(settings) == len([r for r in rows if r["contender"] == Published.name])
        assert len({str(s[keys[axis]]) for s in settings}) == len(settings) > 1
        for setting in settings:
            assert {**setting, keys[axis]: None} == {**base, keys[axis]: None}


@pytest.mark.parametrize(
    "setting", [QUICK, replace(QUICK, G=1, K=2, P=1), replace(QUICK, K=5, A=9, rationale=(1, 30))]
)
def test_ours_reads_each_prompt_once_and_heads_take_rationale_and_answer_rows(tmp_path, setting):
    problem = StepProblem(setting, DEVICE)
    passes = passes_of(Ours.name, tmp_path, problem)
    assert [(p.model, p.with_gradient) for p in passes] == [("reference", False), ("policy", True)]
    per_group = setting.P + sum(R - 1 + setting.A - 1 for R in setting.lengths)
    for one in passes:
        assert one.tokens == setting.G * per_group
        assert one.rows == setting.G * sum(R + setting.A for R in setting.lengths)


@pytest.mark.parametrize("setting", [QUICK, replace(QUICK, G=1, K=5, P=7)])
def test_our_step_reads_each_prompt_once_for_all_of_its_rationales(tmp_path, setting):
    ours = Ours(StepProblem(setting, DEVICE), tmp_path)
    with ours.counted() as passes:
        ours.step()
    sampling = [p.tokens for p in passes[:-2]]
    lengths = [length for group in ours.lengths for length in group]
    assert len(lengths) == setting.G * setting.K
    # The prompts, one or several in a pass; then one token of each sequence that has not ended.
    decoded = [sum(length > n for length in lengths) for n in range(1, max(lengths))]
    prompts = len(sampling) - len(decoded)
    assert sum(sampling[:prompts]) == setting.P * setting.G
    assert sampling[prompts:] == decoded


@pytest.mark.parametrize(("name", "batch"), [(Published.name, 8), (PublishedRecipe.name, 4)])
def test_the_published_update_reads_padding_and_takes_it_through_the_head(tmp_path, name, batch):
    passes = passes_of(name, tmp_path, StepProblem(QUICK, DEVICE))
    z = QUICK.P + QUICK.rationale[1]
    expected = [("policy", False, 8 * z), ("reference", False, 8 * z)]
    expected += [("policy", False, 8 * (z + QUICK.A))]
    expected += [("policy", True, batch * z), ("policy", True, batch * (z + QUICK.A))] * (
        8 // batch
    )
    assert [(p.model, p.with_gradient, p.tokens) for p in passes] == expected
    assert [p.rows for p in passes] == [p.tokens for p in passes]


def test_trl_scores_and_updates_rationales_alone(tmp_path):
    if (why := absent(Trl.name)) is not None:
        pytest.skip(why)
    passes = passes_of(Trl.name, tmp_path, StepProblem(QUICK, DEVICE))
    S, z = QUICK.G * QUICK.K, QUICK.P + QUICK.rationale[1]
    models = [("policy", False), ("reference", False), ("policy", True)]
    assert [(p.model, p.with_gradient) for p in passes] == models
    assert [(p.tokens, p.rows) for p in passes] == [(S * z, S * (z - 1))] * 3


def test_rollouts_have_the_lengths_of_their_setting():
    for setting in (QUICK, CPU, replace(GPU, model=QUICK.model)):
        groups = StepProblem(setting, DEVICE).groups()
        assert len(groups) == setting.G
        for group in groups:
            assert [len(r.sampled_ids) for r in group] == setting.lengths
            assert {len(r.prompt_ids) for r in group} == {setting.P}
            assert {len(r.answer_ids) for r in group} == {setting.A}
            assert all(r.finished and len(r.rationale_ids) == len(r.sampled_ids) - 1 for r in group)
        assert setting.lengths[0] == setting.rationale[0]
        assert setting.lengths[-1] == setting.rationale[1]


def test_the_cpu_model_has_twenty_to_thirty_million_parameters():
    policy, reference = StepProblem(CPU, DEVICE).models()
    assert 20e6 < policy.num_parameters() < 30e6
    assert not any(p.requires_grad for p in reference.parameters())


def test_an_answer_needs_room():
    with pytest.raises(ValueError, match=r"A: expected at least 5, .* got 4"):
        StepProblem(replace(QUICK, A=4), DEVICE)


def test_rationales_stop_by_chance_at_every_length_alike(tmp_path):
    setting = replace(QUICK, G=1, K=300, rationale=(2, 4))
    ours = Ours(StepProblem(setting, DEVICE), tmp_path)
    ours.step()
    counts = Counter(length for group in ours.lengths for length in group)
    assert set(counts) == {2, 3, 4}
    # A hundred each; five standard deviations of a binomial variate are 41.
    assert all(59 <= count <= 141 for count in counts.values())


def test_without_the_chance_to_stop_the_model_is_as_before():
    problem = StepProblem(QUICK, DEVICE)
    model, _ = problem.models()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with stops_by_chance(model, QUICK, problem.tokenizer.eos_token_id):
        within = model(ids, use_cache=True).logits
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(within, before)


def test_the_published_step_samples_to_the_limit_and_cuts_at_the_lengths_given(tmp_path):
    problem = StepProblem(QUICK, DEVICE)
    published = Published(problem, tmp_path)
    published.lengths = [[3, 4, 5, 9], [8, 7, 6, 5]]
    seen, update = [], published.update
    published.update = lambda groups: seen.extend(groups) or update(groups)
    published.step()
    assert [[len(r.sampled_ids) for r in group] for group in seen] == published.lengths
    assert published.model.lm_head.weight.grad is not None


def test_largest_doubles_until_memory_is_out(monkeypatch):
    def hold(name, setting, device):
        if setting.G > 4:
            raise torch.OutOfMemoryError
        sequences = setting.G * setting.K
        return Held(contender=name, G=setting.G, sequences=sequences, seconds=1.0, peak=1)

    monkeypatch.setattr(measure, "_hold", hold)
    held = measure.largest(Ours.name, QUICK, DEVICE, limit=1024)
    assert [one.G for one in held] == [1, 2, 4]
    assert [one.G for one in measure.largest(Ours.name, QUICK, DEVICE, limit=2)] == [1, 2]


def test_largest_takes_all_in_one_batch():
    held = measure.largest(Published.name, QUICK, DEVICE, limit=2)
    assert [(one.G, one.sequences) for one in held] == [(1, 4), (2, 8)]
    assert all(one.seconds > 0 for one in held)


def test_largest_does_not_count_what_the_trainer_had_to_split(tmp_path):
    problem = StepProblem(QUICK, DEVICE)
    ours = Ours(problem, tmp_path, one_batch=True)
    once = []

    def full_memory(module, args):
        if not once:
            once.append(module)
            raise torch.OutOfMemoryError("out of memory")

    ours.model.model.layers[0].register_forward_pre_hook(full_memory)
    with pytest.raises(torch.OutOfMemoryError, match="had to split"):
        ours.update(problem.groups())


@pytest.mark.parametrize("argv", [["--sections", "all"], ["--contenders", "nobody"]])
def test_bad_arguments_say_what_was_expected(argv, capsys):
    with pytest.raises(SystemExit):
        step.parse_args(argv)
    assert "expected some of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    StepProblem(replace(QUICK, V=211), DEVICE).models()[0].save_pretrained(folder)
    return str(folder)


def test_a_model_is_taken_with_its_weights_and_its_vocabulary(saved):
    setting = step.parse_args(["--quick", "--model_name_or_path", saved]).setting
    assert setting == replace(QUICK, model=saved, V=211)
    problem = StepProblem(setting, DEVICE)
    policy, reference = problem.models()
    expected, _ = StepProblem(replace(QUICK, V=211), DEVICE).models()
    for name, weight in expected.state_dict().items():
        assert torch.equal(policy.state_dict()[name], weight)
        assert not torch.equal(reference.state_dict()[name], weight)
    assert policy.generation_config.eos_token_id == problem.tokenizer.eos_token_id


def test_the_published_gradient_is_ours_on_a_model_that_is_given(saved, tmp_path):
    arguments = ["--quick", "--sections", "update", "--contenders", Published.name, "--reps", "1"]
    step.main([*arguments, "--model_name_or_path", saved, "--out", str(tmp_path)])
    ours, published = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert ours["setting"]["model"] == saved
    assert 0 <= published["gradient_error"] < 1e-4


def test_a_model_is_measured_in_an_update_and_a_step_alone(saved, capsys):
    model = ["--device", "cpu", "--model_name_or_path", saved]
    assert step.parse_args(model).sections == ["update", "step"]
    with pytest.raises(SystemExit):
        step.parse_args([*model, "--sections", "scaling"])
    assert "--sections: expected no scaling with a model" in capsys.readouterr().err


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        step.parse_args(["--model_name_or_path", str(tmp_path)])
    assert "error: --model_name_or_path: " in capsys.readouterr().err


def test_settings_follow_the_device():
    assert step.parse_args(["--device", "cpu"]).setting == CPU
    on_gpu = step.parse_args(["--device", "cuda", "--prompts", "2"])
    assert on_gpu.setting == replace(GPU, G=2)
    assert on_gpu.sections == list(step.SECTIONS)
    assert "largest" not in step.parse_args(["--device", "cpu"]).sections

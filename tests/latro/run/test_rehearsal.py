"""What would fail late in a run raises an error before its first update."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig

from latro.run.rehearsal import try_saving, try_schedule


def nothing_was_done(tmp_path):
    return not any(tmp_path.iterdir()) or not any((tmp_path / "run").iterdir())


def test_a_generation_config_that_cannot_be_saved(make_trainer, tiny, tmp_path):
    model = tiny()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.7)
    with pytest.raises(ValueError, match="model: its generation config cannot be saved") as caught:
        make_trainer(model, max_steps=1).train()
    assert "\n" not in str(caught.value)
    assert "temperature" in str(caught.value)
    assert nothing_was_done(tmp_path)


def test_a_config_that_is_no_json(make_trainer, tiny, tmp_path):
    model = tiny()
    model.config.note = object()
    with pytest.raises(ValueError, match=r"its config cannot be saved.*not JSON serial"):
        make_trainer(model, max_steps=1).train()
    assert nothing_was_done(tmp_path)


def test_a_tokenizer_that_cannot_be_saved(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(max_steps=1)

    def refuse(folder):
        raise ValueError("no vocabulary\nhere")

    monkeypatch.setattr(trainer.processing_class, "save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"its tokenizer cannot be saved.*no vocabulary here"):
        trainer.train()
    assert nothing_was_done(tmp_path)


def test_the_names_are_those_that_saving_leaves(tiny, tokenizer, tmp_path):
    model = tiny()
    names = try_saving(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert names | {"model.safetensors"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
            "lr_scheduler_type: inverse_sqrt",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5.0}},
            "lr_scheduler_type: polynomial .*cannot be made",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -5.0}},
            r"lr_scheduler_type: expected learning rates from 0 .* polynomial gives -",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: cosine_with_min_lr .*cannot be made: .*min_lr",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"speed": 2}},
            "lr_scheduler_type: cosine .*cannot be made: .*speed",
        ),
        ({"optim": "galore_adamw"}, "optim: galore_adamw .*cannot be made"),
        ({"optim_args": "rank"}, "optim: .*optim_args 'rank' cannot be made"),
        ({"optim_args": "eps=1e-6"}, "optim: adamw_torch.*cannot be made: it has no argument eps"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9,beta=1"},
            "optim: sgd .*cannot be made: it has no argument beta",
        ),
        ({"optim_target_modules": ["q_proj"]}, "optim: .*it has no target modules, got .'q_proj'"),
    ],
)
def test_a_schedule_or_optimiser_that_fails(make_trainer, tmp_path, setting, message):
    trainer = make_trainer(max_steps=4, **setting)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert nothing_was_done(tmp_path)
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("at", [0, 1, 7, 10])
@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, 1e39])
def test_every_update_s_rate_is_looked_at(at, rate):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda update: rate if update == at else 1.0)
    with pytest.raises(ValueError, match=rf"lr_scheduler_type: .*mine gives .* after update {at};"):
        try_schedule(scheduler, 10, "mine")
    try_schedule(LambdaLR(optimizer, lambda update: 1 / (11 - update)), 10, "mine")


def test_a_schedule_that_divides_by_zero_at_its_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda update: 1 / (10 - update))
    with pytest.raises(ValueError, match="mine has no learning rate after update 10: ZeroDivision"):
        try_schedule(scheduler, 10, "mine")


@pytest.mark.parametrize("value", ["momentum=0.9,nesterov=true", "momentum=0,nesterov=false"])
def test_arguments_that_an_optimiser_reads_are_taken_whatever_their_values(make_trainer, value):
    group = make_trainer(optim="sgd", optim_args=value).create_optimizer().param_groups[0]
    assert f"momentum={group['momentum']:g},nesterov={group['nesterov']}".lower() == value

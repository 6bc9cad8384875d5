from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from latro.update.nonfinite import FiniteUpdates


class Weights(TrainerCallback):
    """Weights and Adam's moments after every update."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        self.after.append([t.clone() for t in (*model.parameters(), *moments)])

    def changed(self, update):
        pairs = zip(self.after[update - 1], self.after[update - 2], strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)


def spoil(trainer, where, updates, first_micro_step_only=False):
    """Infinite gradients of one weight, or hidden states that are NaN, in some updates."""

    def now():
        spoilt = trainer.state.global_step + 1 in updates
        return spoilt and not (first_micro_step_only and trainer._micro_step)

    norm = trainer.model.model.norm
    if where == "gradient":
        norm.weight.register_hook(lambda grad: grad * float("inf") if now() else grad)
        return
    rollout = trainer.rollout

    def rollout_then_spoil(examples):
        # Afterwards: what is sampled is not to be spoilt too.
        groups = rollout(examples)
        if now():
            norm.register_forward_hook(
                lambda module, args, output: output * float("nan") if now() else output
            )
        return groups

    trainer.rollout = rollout_then_spoil


@pytest.mark.parametrize("where", ["gradient", "statistics"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_that_is_not_finite_is_skipped(make_trainer, caplog, where, accumulation):
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 1,
        "beta": 0.0,
    }
    undisturbed = make_trainer(**settings)
    undisturbed.train()
    trainer, weights = make_trainer(**settings), Weights()
    trainer.add_callback(weights)
    spoil(trainer, where, {3}, first_micro_step_only=accumulation > 1)
    trainer.train()
    assert [weights.changed(update) for update in (2, 3, 4)] == [True, False, True]
    assert all(t.isfinite().all() for t in weights.after[-1])
    logs, expected = (
        [entry for entry in t.state.log_history if "loss" in entry] for t in (trainer, undisturbed)
    )
    assert [entry["skipped_updates"] for entry in logs] == [0, 0, 1, 0]
    assert [entry["skipped_updates"] for entry in expected] == [0, 0, 0, 0]
    for name in ("step", "learning_rate"):
        assert [entry[name] for entry in logs] == [entry[name] for entry in expected]
    # The spoilt update has statistics where one of its steps, or all but the gradient, was finite.
    assert ("reward" in logs[2]) == (where == "gradient" or accumulation > 1)
    (record,) = (r for r in caplog.records if r.name == "latro.update.nonfinite")
    assert record.message.startswith("update 3 is not finite (")
    assert ("answer_logp" in record.message) == (where == "statistics")
    assert "gradient" in record.message


def test_too_many_in_a_row_stop_the_run(make_trainer):
    settings = {"max_steps": 7, "max_skipped_updates": 2, "beta": 0.0}
    trainer = make_trainer(**settings)
    spoil(trainer, "gradient", {1, 2, 4, 5, 7})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_updates"] for entry in logs] == [1, 1, 0, 1, 1, 0, 1]
    trainer = make_trainer(**settings)
    spoil(trainer, "gradient", {2, 3, 4})
    with pytest.raises(FloatingPointError, match=r"update 4 is not finite \(gradient\), number 3"):
        trainer.train()


def test_a_loss_scale_is_left_its_search():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = SimpleNamespace(
        scaler=scaler,
        sync_gradients=True,
        is_main_process=True,
        distributed_type=DistributedType.NO,
        reduce=lambda faults, reduction: faults,
    )
    look = FiniteUpdates(("reward",), 0, accelerator)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.weight.detach().clone()

    def update(gradient, reward):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * gradient).backward()
        finding = look(model, torch.tensor(1.0), torch.tensor([reward], dtype=torch.float64), 1)
        scaler.step(optimizer)
        scaler.update()
        return finding

    # An infinite gradient is the scaler's to skip, and is not counted.
    assert not update(float("inf"), 1.0).skipped
    assert torch.equal(model.weight, before)
    look.limit = 1
    finding = update(1.0, float("nan"))
    assert finding.skipped
    assert finding.sums is None
    assert torch.equal(model.weight, before)
    assert update(1.0, 1.0).sums == [1.0]
    assert not torch.equal(model.weight, before)


SCRIPT = """
import torch
from accelerate import Accelerator
from latro.update.nonfinite import FiniteUpdates

accelerator = Accelerator(cpu=True)
look = FiniteUpdates(("reward",), 1, accelerator)
model = torch.nn.Linear(2, 1)

def update(reward, gradient):
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad *= gradient
    return look(model, torch.tensor(1.0), torch.tensor([reward], dtype=torch.float64), 1)

other = accelerator.process_index == 1
finding = update(float("nan") if other else 1.0, 1.0)
assert finding.skipped and model.weight.grad is None
assert (finding.sums is None) == other
assert not update(1.0, 1.0).skipped and model.weight.grad is not None
assert update(1.0, float("nan") if other else 1.0).skipped
try:
    update(1.0, 1.0 if other else float("inf"))
except FloatingPointError as error:
    assert "(gradient), number 2" in str(error)
else:
    raise AssertionError("the second in a row went through")
"""


def test_what_one_process_finds_holds_for_all(tmp_path, warm):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    warm.run_together(str(script), (), tmp_path / "printed", processes=2)

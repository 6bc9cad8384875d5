from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from latro.rollout.sequences import Rollout
from latro.update.coefficients import LikelihoodCoefficients
from latro.update.gradient import Update
from latro.update.out_of_memory import is_out_of_memory


def run_out(trainer, where, tokens, micro_step=0):
    """Memory runs out for batches of more than `tokens`, from accumulation step `micro_step` on.

    In a backward it does so in the middle, when later layers have their gradients already.
    """

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hook(module, args, kwargs, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[0] * states.shape[1] <= tokens or trainer._micro_step < micro_step:
            return
        if where == "forward":
            fail()
        if states.requires_grad:
            states.register_hook(fail)

    layer = trainer.model.model.layers[0]
    return layer.register_forward_hook(hook, with_kwargs=True)


def budgets(caplog):
    return [r.args[0] for r in caplog.records if r.name == "latro.update.out_of_memory"]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kl", ["reward", "exact"])
def test_gradients_are_those_of_the_smaller_budget(make_trainer, tiny, rollouts, caplog, where, kl):
    groups = rollouts(3, 4)

    def gradients(limit=None, **settings):
        model = tiny(seed=1)
        trainer = make_trainer(model, tiny(seed=2), beta=0.3, kl=kl, **settings)
        trainer.rollout = lambda examples: groups
        if limit is not None:
            run_out(trainer, where, limit)
        loss = trainer.training_step(model, {"examples": []})
        return trainer, loss, [p.grad for p in model.parameters()]

    whole, _, _ = gradients()
    total = whole.update.trunk_tokens
    trainer, loss, found = gradients(limit=total // 3)
    budget = trainer.update.token_budget
    assert budget <= total // 3
    assert budgets(caplog)[0] == total // 2
    assert budgets(caplog)[-1] == budget
    _, same_loss, expected = gradients(token_budget=budget)
    assert loss == same_loss
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_earlier_accumulation_steps_are_run_again(make_trainer, tiny, caplog, where):
    def trained(disturbed, **settings):
        model = tiny()
        trainer = make_trainer(model, max_steps=3, gradient_accumulation_steps=3, **settings)
        if disturbed:
            run_out(trainer, where, 60, micro_step=2)
        trainer.train()
        return trainer, [p.detach() for p in model.parameters()]

    trainer, found = trained(True)
    assert budgets(caplog)
    assert not trainer.update._steps
    _, expected = trained(False, token_budget=trainer.update.token_budget)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_one_sequence_that_does_not_fit_is_final(make_trainer):
    trainer = make_trainer()
    run_out(trainer, "backward", 0)
    with pytest.raises(torch.OutOfMemoryError, match="one sequence at a time: lower max_compl"):
        trainer.train()
    # A next try starts with nothing of this one.
    assert not trainer.update._steps


def test_with_several_processes_it_is_final():
    def collate(groups):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    scorer = SimpleNamespace(packed=True, boundary=None, collate=collate)
    several = SimpleNamespace(num_processes=2, sync_gradients=True, device=torch.device("cpu"))
    update = Update(scorer, LikelihoodCoefficients(), several, token_budget=4096)
    rollout = Rollout([1], [2], [3], answer_start=1, finished=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"token_budget 4096: with several processes"):
        update([[rollout]], 1)


def test_other_errors_pass(make_trainer):
    trainer = make_trainer()
    trainer.update._in_one_piece = lambda *_, **__: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        trainer.train()
    assert trainer.update.token_budget == trainer.args.token_budget


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("latro_cpu_linear_logprob: LATRO_OUT_OF_MEMORY"), True),
        (RuntimeError("latro_cuda_linear_kl: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_tells_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_torchs_own_error_on_a_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)

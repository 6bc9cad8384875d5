"""Models over many devices: precision, whole weights for generation, the reference in shards.

DDP keeps a whole copy of the weights in each process. FSDP2 and DeepSpeed ZeRO-3 keep a shard, and
gather a layer's weights for each of its forwards. Decoding calls a forward for every token, so for
its duration the weights are gathered once and kept; where they do not fit, a rollout engine outside
of the process is the way (`latro.engines.vllm`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from latro.model.scoring import Scorer
from latro_kernels.integrations.logits import is_shard

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether a process holds a part of each weight only."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return kind == DistributedType.FSDP


def keep_output_dtype(accelerator: Accelerator) -> None:
    """Let FSDP2 return what forwards return, with log-probs in fp32.

    accelerate's policy for mixed precision would cast it all. Call this before a model is sharded.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def keep_fp32_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Let the optimiser step fp32 weights under mixed precision, whatever they were saved in.

    bf16 keeps 8 bits: to a weight of 0.02 an update of 5e-7 is nothing. FSDP2 and DeepSpeed make
    fp32 weights of their own.
    """
    kind = accelerator.distributed_type
    half = [p for p in model.parameters() if p.requires_grad and p.dtype in _HALF]
    if not half or kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if accelerator.mixed_precision == "no":
        logger.warning(
            "the weights are trained in %s, where small updates are lost in rounding: take --bf16 "
            "true, or --dtype float32",
            half[0].dtype,
        )
        return
    for parameter in half:
        parameter.data = parameter.data.float()


def follow_fp32_weights(
    ref_model: PreTrainedModel, policy: nn.Module, accelerator: Accelerator
) -> None:
    """Make fp32 of the reference's half precision weights that the policy has in fp32.

    Under mixed precision `keep_fp32_weights` made the policy's so. A layer that autocast leaves
    alone would round the reference's in another way, and the KL would begin above 0.
    """
    if accelerator.mixed_precision == "no":
        return
    of_policy = dict(policy.named_parameters())
    for name, parameter in ref_model.named_parameters():
        half = parameter.dtype in _HALF
        if half and name in of_policy and of_policy[name].dtype == torch.float32:
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def whole_on_load() -> Iterator[None]:
    """Let transformers load whole models under ZeRO-3 too, for the Trainer to shard.

    A model that is sharded as it is loaded could neither be checked nor copied for a reference.
    """
    config = hf_deepspeed.deepspeed_config()
    if config is None:
        yield
        return
    handle = hf_deepspeed._hf_deepspeed_config_weak_ref()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(handle)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model that transformers sharded as it loaded it.

    It does so where a config with ZeRO-3 was made before the model.
    """
    if any(is_shard(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model: expected whole weights, which the trainer shards, got weights that ZeRO-3 "
            "sharded when they were loaded; load the model before you make args, or by "
            "latro.loading.load_model"
        )


@contextlib.contextmanager
def gathered(scorer: Scorer, accelerator: Accelerator) -> Iterator[None]:
    """Keep every weight of the scorer's model whole, so that no forward waits for other processes.

    All processes must enter and leave together.
    """
    wrapper = scorer.caller
    scorer.caller = scorer.model
    try:
        if wrapper is scorer.model and not isinstance(wrapper, FSDPModule):
            # Before training an engine has not taken the model over.
            yield
        elif not is_sharded(accelerator):
            yield
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:
            with _unwrapped(wrapper):
                yield
        else:
            with _unsharded(scorer.model, accelerator):
                yield
    finally:
        scorer.caller = wrapper


@contextlib.contextmanager
def _unwrapped(engine: Any) -> Iterator[None]:
    """Keep the weights of a DeepSpeed engine's model whole, and its hooks away."""
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    with unwrap_model_for_generation(engine):
        # DeepSpeed (0.19) leaves one hook on the model, which compares the processes' orders of
        # layers as a forward begins. It would wait for a process that has nothing to decode.
        coordinator.reset_step = _do_nothing
        try:
            yield
        finally:
            del coordinator.reset_step


def _do_nothing() -> None:
    pass


@contextlib.contextmanager
def _unsharded(model: PreTrainedModel, accelerator: Accelerator) -> Iterator[None]:
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, FSDPModule):
        # A module's backward gathers early the weights of what ran before it, and for FSDP2 (torch
        # 2.13) a forward in here ran before the embedding of the next one. A process that has
        # nothing to sample runs none, and the others would wait for it. With itself to gather,
        # which it has, the embedding gathers nothing.
        embedding.set_modules_to_backward_prefetch([embedding])
    try:
        yield
    finally:
        # As accelerate had set it: blocks and the embedding give their weights back after a
        # forward. The head and what is left in the root do not: their backward comes first.
        reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        kept = {model, *_tail(model)}
        for module in modules:
            module.set_reshard_after_forward(reshard and module not in kept, recurse=False)
            module.reshard()


def _tail(model: PreTrainedModel) -> list[nn.Module]:
    """Return the head, and what shares its weights or its place at the end of the forward."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    blocks = {m for parent in model.modules() if isinstance(parent, nn.ModuleList) for m in parent}
    inside = {m for block in blocks for m in block.modules()}
    modules: Iterator[nn.Module] = model.modules()
    return [
        m
        for m in modules
        if isinstance(m, FSDPModule) and m not in inside and (m is not embedding or tied)
    ]


def sharded_like(parameter: nn.Parameter, whole: Tensor, accelerator: Accelerator) -> Tensor:
    """Return process 0's `whole` as the engine keeps `parameter`: its device, dtype and shard.

    All processes must call this together.
    """
    dtype = parameter.dtype
    # Under ZeRO-3 a parameter outside of a forward is empty, and whole where it can be written.
    device = accelerator.device
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            whole.to(device, dtype), parameter.device_mesh, parameter.placements
        )
    copy = whole.to(device, dtype, copy=True)
    return broadcast(copy) if accelerator.num_processes > 1 else copy


@contextlib.contextmanager
def writable(
    model: nn.Module, parameters: Sequence[nn.Parameter], accelerator: Accelerator
) -> Iterator[None]:
    """Let `parameters` of `model` be written to within, so that the next forward sees the change.

    All processes must enter and leave together, and write the same.
    """
    if is_sharded(accelerator) and accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
            yield
        return
    # Some are whole from a forward that no backward followed.
    _reshard(model)
    yield


def _reshard(model: nn.Module) -> None:
    modules: Iterator[nn.Module] = model.modules()
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_forwards(model: nn.Module, accelerator: Accelerator) -> None:
    """Let an engine forget the forwards so far, which called the head as a module.

    For forwards that read the head's weight without calling the head, as TRL's do. All processes
    must call this together.
    """
    if not torch.is_grad_enabled():
        # FSDP2 leaves the head whole for a backward. Whoever read it then would lose it at the
        # backward of another forward, whose hooks shard it.
        _reshard(model)
    if not is_sharded(accelerator) or accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if accelerator.deepspeed_engine_wrapped is not None:
        # By the order of one forward's layers DeepSpeed gathers ahead in the next. A head that is
        # on its way is taken for one that is there.
        optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
        # Without an optimiser, in an evaluation, DeepSpeed has the offload in its place.
        offload = getattr(optimizer, "parameter_offload", optimizer)
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


def prepare_reference(ref_scorer: Scorer, accelerator: Accelerator) -> None:
    """Shard a frozen model as the policy is; nothing to do where each process has all of it."""
    if not is_sharded(accelerator):
        return
    model = ref_scorer.model
    ref_scorer.sharded = True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed

        # Without an optimiser, which is how ZeRO-3 shards what is not trained. What is "auto" the
        # Trainer fills in for the policy, later; here DeepSpeed's own defaults do.
        config = _without_auto(accelerator.state.deepspeed_plugin.deepspeed_config)
        for name in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
            config.pop(name, None)
        config["train_micro_batch_size_per_gpu"] = 1
        ref_scorer.caller, *_ = deepspeed.initialize(model=model, config=config)
        ref_scorer.caller.eval()
        return
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    ref_scorer.caller = fsdp2_prepare_model(accelerator, model)


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if value != "auto"
    }

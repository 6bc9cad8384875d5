"""Adapters by PEFT: what can be trained, the model under one, and the weight of a head with one.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds scaling · B·A to a frozen weight, and B is 0 at the
start. So a model with a new adapter is its own reference: with it off it is π_0, and the KL to it
is exactly 0 before the first update, without a second copy of the weights. `latro.model.initial`
has the reference of an adapter that came trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, is_peft_available

from latro_kernels.integrations.logits import adds_to

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from latro.config.model import PeftArguments


# They ask more of a forward than tokens: a task's number, scalings of a pass before, other states,
# an attention of their own.
_OF_OTHER_FORWARDS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")
# Lily mixes its experts by the mean of its router over all tokens of a batch.
_OF_WHOLE_BATCHES = ("LILY",)
# They change the model's own weights too, by random numbers, or by data that loading does not have.
_NOT_REPEATED = ("pissa_niter", "corda", "lora_ga")
_SHOWN_NAMES = 3


def lora_config(args: PeftArguments, revision: str) -> PeftConfig | None:
    """Return PEFT's own settings, from the command line's; None without `use_peft`.

    Args:
        args: the settings.
        revision: of the base model on the hub, noted for whoever loads the adapter.

    Raises:
        ValueError: PEFT is not installed.
    """
    if not args.use_peft:
        return None
    require_peft("use_peft")
    from peft import LoraConfig

    targets: list[str] | str | None = args.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        # PEFT takes a list for names, and a string for a pattern or for this word.
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=args.lora_target_parameters,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        revision=None if revision == "main" else revision,
    )


def require_peft(name: str) -> None:
    """Raise ValueError where PEFT is not installed; `name` is the argument that needs it."""
    if not is_peft_available():
        raise ValueError(
            f"{name}: needs the package peft, which is not installed: "
            "pip install 'latro-kernels[peft]'"
        )


def has_adapter(model: nn.Module) -> bool:
    """Return whether `model` is PEFT's wrapper of a model."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def without_wrapper(model: Any) -> PreTrainedModel:
    """Return the model in PEFT's wrapper, its adapters in their places; or the model itself."""
    return model.get_base_model() if has_adapter(model) else model


def adapter_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the factors that adapters do not train, as the random ones of VeRA and TinyLoRA."""
    if is_peft_available():
        from peft.tuners._buffer_dict import BufferDict

        for module in model.modules():
            if isinstance(module, BufferDict):
                yield from (b for b in module.buffers() if b.is_floating_point())


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Return `peft.get_peft_model(model, peft_config)`, where LaTRO can train with the settings.

    Raises:
        TypeError: `peft_config` is none of PEFT's.
        ValueError: PEFT is not installed, the model has an adapter already, it lacks a weight that
            is named, or dropout is asked for: a rationale is scored by the policy that sampled it;
            or see `check_kind`.
    """
    require_peft("peft_config")
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}"
        )
    if has_adapter(model):
        raise ValueError(
            "peft_config: expected a model without adapter, got one that has one; leave "
            "peft_config out to train that one, or merge it first (merge_and_unload)"
        )
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"lora_dropout: expected 0 (a rationale is scored by the policy that sampled it), got "
            f"{dropout}"
        )
    check_kind(peft_config)
    # PEFT would only warn.
    for target in getattr(peft_config, "target_parameters", None) or ():
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_parameters()):
            raise ValueError(
                "lora_target_parameters: expected names of the model's weights, or their ends, got "
                f"{target!r}, which is none"
            )
    return get_peft_model(model, peft_config)


def check_adapter(model: PeftModel) -> None:
    """Check that a model with adapters can be trained.

    Raises:
        ValueError: it cannot; the message says why.
    """
    for config in model.peft_config.values():
        check_kind(config)
    merged = model.get_model_status().merged_adapters
    if merged:
        raise ValueError(f"model: its adapters {merged} are merged; call unmerge_adapter() first")
    _check_saved(model)


def _check_saved(model: PeftModel) -> None:
    """Raise ValueError for an adapter that cannot be saved, or a trained weight that is in none."""
    from peft import get_peft_model_state_dict

    given = model.state_dict(keep_vars=True)
    saved: set[int] = set()
    with warnings.catch_warnings():
        # They are of the saving itself.
        warnings.simplefilter("ignore")
        for adapter in model.peft_config:
            try:
                of_adapter = get_peft_model_state_dict(model, given, adapter_name=adapter)
            except (LookupError, ValueError, RuntimeError) as error:
                # PEFT takes tokens that one adapter trains for those of all.
                raise ValueError(
                    f"model: its adapter {adapter!r} cannot be saved, and so the trained model "
                    f"could not be either: {error!r}"
                ) from error
            saved.update(id(tensor) for tensor in of_adapter.values())
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        more = ", …" if len(lost) > _SHOWN_NAMES else ""
        raise ValueError(
            "model: expected to train what PEFT saves with its adapters, got "
            f"{len(lost)} trained weights that it does not save "
            f"({', '.join(lost[:_SHOWN_NAMES])}{more}); freeze them, or have the settings of the "
            "adapter save them (modules_to_save)"
        )


def check_kind(config: PeftConfig, name: str = "peft_config") -> None:
    """Check that an adapter can be scored in packed rows, sampled from, saved and loaded.

    Args:
        config: of the adapter.
        name: what the message begins with.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"{name}: {config.peft_type.value} adds tokens to every prompt; expected an "
            "adapter of the model's layers, like LoRA"
        )
    if config.peft_type.value in _OF_OTHER_FORWARDS:
        raise ValueError(
            f"{name}: {config.peft_type.value} needs a forward of its own, which packed rows "
            "and decoding do not make; expected an adapter of each layer by itself, like LoRA"
        )
    if config.peft_type.value in _OF_WHOLE_BATCHES:
        raise ValueError(
            f"{name}: {config.peft_type.value} computes a token by all tokens of its batch, "
            "later ones and other sequences too; expected an adapter of each token by itself, like "
            "LoRA"
        )
    initialised = getattr(config, "init_lora_weights", None)
    if str(initialised).lower().startswith(_NOT_REPEATED):
        raise ValueError(
            f"{name}: init_lora_weights={initialised!r} changes the weights under the adapter "
            "in a way that loading the saved one does not repeat, and it would stand on others; "
            "expected True, or 'pissa' or 'olora', which are repeated"
        )
    if getattr(config, "monteclora_config", None):
        # It draws them ahead, so that a forward that is tried draws nothing.
        raise ValueError(
            f"{name}: monteclora_config draws other weights in each forward of training; a "
            "rationale has to be scored by the policy that sampled it"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{name}: alora_invocation_tokens switch the adapter on inside of a sequence, "
            "which packed rows cannot follow"
        )


@contextmanager
def activity_kept(model: Any) -> Iterator[None]:
    """Keep which adapters are on and which weights are trained, while others load adapters.

    The Trainer leaves only the first of several adapters on, and PEFT lets every weight of an
    adapter that it loads require a gradient, or none.
    """
    if not has_adapter(model):
        yield
        return
    current, active = model.active_adapter, list(model.active_adapters)
    with requires_grad_kept(model):
        try:
            yield
        finally:
            model.set_adapter(current)
            model.base_model.set_adapter(active)


@contextmanager
def requires_grad_kept(model: nn.Module) -> Iterator[None]:
    """Keep which weights require a gradient, while PEFT loads adapters or switches them."""
    given = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in given:
            parameter.requires_grad_(requires_grad)


def weight_under(layer: str) -> re.Pattern[str]:
    """Return what PEFT calls the weight [V, H] of `layer`, be it under an adapter or under none."""
    under = r"((token_adapter\.)?base_layer|original_module)"
    return re.compile(rf"{re.escape(layer)}\.({under}\.)?weight")


def save_vocabulary(
    model: PeftModel, folder: str, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Save both embedding and head with an adapter where PEFT has saved one of the two.

    It saves what lies under an adapter on either, since the vocabulary may be another than the base
    model's, and would leave the other one's new rows nowhere.

    Args:
        model: has been saved.
        folder: where.
        state_dict: the model's weights, gathered where it is sharded.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [name for name, module in model.named_modules() if any(module is la for la in layers)]
    if len(paths) != 2 or layers[0].weight is layers[1].weight:
        return
    of_layers = [weight_under(path) for path in paths]
    for adapter in model.peft_config:
        file = Path(folder, "" if adapter == "default" else adapter, ADAPTER_SAFE_WEIGHTS_NAME)
        if not file.exists():
            continue
        with safe_open(file, "pt") as saved:
            names = set(saved.keys())
        given = model.state_dict() if state_dict is None else state_dict
        # A bias is as long as the vocabulary too.
        needed = {
            name: tensor
            for name, tensor in given.items()
            if any(of.fullmatch(re.sub(r"\.bias$", ".weight", name)) for of in of_layers)
        }
        if names & needed.keys() and needed.keys() - names:
            others = {n: needed[n].detach().cpu().contiguous() for n in needed.keys() - names}
            save_file(load_file(file) | others, file, metadata={"format": "pt"})


def check_ties(model: PreTrainedModel | PeftModel) -> None:
    """Check that head and embedding are one where the model's config ties them.

    A server builds its model by that config, and takes the embedding for its head.

    Raises:
        ValueError: they are two, be it by what an adapter adds to one of them.
    """
    if not model.config.get_text_config().tie_word_embeddings:
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # The weights of a layer with an adapter that adds to them are those under it.
    if head.weight is not embedding.weight or adds_to(head) or adds_to(embedding):
        raise ValueError(
            "rollout_engine: expected head and embedding to be one, as the model's config ties "
            "them and vLLM with it, got two, or an adapter on them; leave them out of the adapter, "
            "take rollout_engine=transformers, or serve and train a copy of the model that is "
            "saved untied"
        )


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight [V, H] and bias [V] that make a head's logits, active adapters included.

    Of LoRA weight + Σ scaling · B·A over the active adapters, in the weight's dtype and
    differentiable in A and B; of `modules_to_save` the copy that is trained; with adapters off or
    merged the head's own.

    Raises:
        ValueError: an adapter that is no sum with a product of two matrices, like DoRA.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    if not is_peft_available():
        return weight, bias
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    adapted = isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    # The attributes of a ModulesToSaveWrapper are those of the copy that its forward calls.
    if not adapted or isinstance(head, ModulesToSaveWrapper) or head.disable_adapters:
        return weight, bias
    # FSDP makes a class of its own of each that it shards, with the forward that it had.
    if not isinstance(head, Linear) or type(head).forward is not Linear.forward:
        raise ValueError(
            "model: expected a head without adapter, or with LoRA's, got one with "
            f"{type(head).__name__}; leave the head out of the adapter, and the embedding too "
            "where they are tied, or train one of them whole (modules_to_save)"
        )
    if head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name in head.lora_variant:
            raise ValueError(
                f"model: expected plain LoRA on the head, got {type(head.lora_variant[name])}; "
                "leave the head out of target_modules"
            )
        if name not in head.lora_A:
            continue
        weight = weight + head.get_delta_weight(name).to(weight.dtype)
        added = head.lora_B[name].bias
        if added is not None:
            added = head.scaling[name] * added.to(weight.dtype)
            bias = added if bias is None else bias + added
    return weight, bias

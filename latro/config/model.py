"""The arguments of the model, and of an adapter on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from latro.config.fields import WEIGHT_DTYPES, check_settings, setting
from latro.config.ranges import at_least


@dataclass
class ModelArguments:
    """The model to load, and how to load it; names of quantisation are TRL's.

    Raises:
        ValueError: both quantisations are asked for, or a setting of one without it.
    """

    _argument_group_name = "model"

    model_name_or_path: str | None = setting(
        None,
        "A hub id, a model directory or a GGUF file; without it the small model that ships.",
    )
    gguf_file: str | None = setting(
        None, "Name of the GGUF file to load from the hub or the directory, dequantised."
    )
    model_revision: str = setting("main", "Branch, tag or commit of a hub model.")
    dtype: str = setting(
        "auto",
        "Dtype of the weights; auto: as they were saved, and fp32 for what mixed precision trains.",
        choices=["auto", *WEIGHT_DTYPES],
    )
    attn_implementation: str | None = setting(
        None,
        "Name of the attention in transformers; without it flash_attention_2 where flash-attn is "
        "installed and dtype is given as bfloat16 or float16, else its default.",
    )
    trust_remote_code: bool = setting(False, "Run model code that comes with a hub model.")
    load_in_4bit: bool = setting(
        False, "Quantise the weights to 4 bits as they are loaded, by bitsandbytes."
    )
    load_in_8bit: bool = setting(
        False, "Quantise the weights to 8 bits as they are loaded, by bitsandbytes."
    )
    bnb_4bit_quant_type: str = setting(
        "nf4",
        "The 16 values that 4 bits stand for: quantiles of a normal distribution, or floats.",
        choices=["nf4", "fp4"],
    )
    use_bnb_nested_quant: bool = setting(
        False,
        "Quantise the scales of 4 bits too, which saves 0.37 bits a weight.",
        "bnb_4bit_use_double_quant",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_8bit: expected one of it and load_in_4bit, got both")
        for f in dataclasses.fields(self):
            given = "bnb" in f.name and getattr(self, f.name) != f.default
            if given and not self.load_in_4bit:
                raise ValueError(f"{f.name}: expected --load_in_4bit true with it")


@dataclass
class PeftArguments:
    """The adapter to train instead of the whole model, with TRL's names and defaults.

    Raises:
        ValueError: a setting is out of its range, or one for an adapter is given without
            `use_peft`.
    """

    _argument_group_name = "adapter"

    use_peft: bool = setting(False, "Train a LoRA adapter by PEFT; the model stays as it is.")
    lora_r: int = setting(16, "r, the rank of the adapter.")
    lora_alpha: int = setting(32, "α: what the adapter adds is scaled by α/r.")
    lora_dropout: float = setting(
        0.0, "Only 0 is allowed: a rationale is scored by the policy that sampled it."
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of layers, or all-linear; without it PEFT's choice for the architecture."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters outside of linear layers, as a mixture's experts: "
            "mlp.experts.gate_up_proj."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of modules that are trained whole, and saved with the adapter."},
    )
    use_rslora: bool = setting(False, "Scale by α/√r.")
    use_dora: bool = setting(False, "DoRA: the direction by LoRA, the magnitude by itself.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.use_peft:
            for f in dataclasses.fields(self):
                if getattr(self, f.name) != f.default:
                    raise ValueError(f"{f.name}: expected --use_peft true with it")
        at_least("lora_r", self.lora_r, 1)
        if self.lora_dropout:
            raise ValueError(
                "lora_dropout: expected 0 (a rationale is scored by the policy that sampled it), "
                f"got {self.lora_dropout}"
            )

"""Settings: their fields, the command line, and what is not supported."""

from latro.config.command_line import parse_arguments
from latro.config.model import ModelArguments, PeftArguments
from latro.config.training import SMALL_MODEL, DataArguments, LatroConfig, SftConfig

__all__ = [
    "SMALL_MODEL",
    "DataArguments",
    "LatroConfig",
    "ModelArguments",
    "PeftArguments",
    "SftConfig",
    "parse_arguments",
]

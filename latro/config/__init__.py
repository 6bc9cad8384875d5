"""Settings: their fields, the command line, and what is not supported."""

from latro.config.command_line import parse_arguments
from latro.config.data import DataArguments
from latro.config.model import ModelArguments, PeftArguments
from latro.config.training import SMALL_MODEL, LatroConfig, SftConfig

__all__ = [
    "SMALL_MODEL",
    "DataArguments",
    "LatroConfig",
    "ModelArguments",
    "PeftArguments",
    "SftConfig",
    "parse_arguments",
]

"""From the command line and a YAML file to dataclasses of settings."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from latro.config import ASSETS, AnswerConfig


def parse_arguments(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    small_settings: str = "default.yaml",
) -> tuple[Any, ...]:
    """Dataclass instances from the command line, over `--config`'s YAML, over the defaults.

    Without `--model_name_or_path` the small model that ships is meant, and the settings made for
    it (`small_settings`, a file in `latro/assets`) stand in for the defaults.

    Raises:
        ValueError: the YAML file is missing, malformed or names an unknown argument.
    """
    # argparse's own usage would be four screens of brackets.
    usage = f"{prog} [--config FILE] [--NAME VALUE ...]"
    parser = HfArgumentParser(classes, prog=prog, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of arguments; the command line wins over it.")
    _group_help(parser, classes)
    argv = list(sys.argv[1:] if argv is None else argv)
    given, _ = _preparse(argv)
    settings = _read_yaml(given.config) if given.config else {}
    if given.model_name_or_path is None and "model_name_or_path" not in settings:
        known = {f.name for cls in classes for f in dataclasses.fields(cls)}
        small = _read_yaml(ASSETS / small_settings)
        settings = {k: v for k, v in small.items() if k in known} | settings
    _reject_unknown(settings, classes, given.config)
    parser.set_defaults(**settings)
    *parsed, _ = parser.parse_args_into_dataclasses(argv)
    return tuple(parsed)


def _preparse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--model_name_or_path", "--model-name-or-path")
    return first.parse_known_args(argv)


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except FileNotFoundError:
        raise ValueError(f"--config: no such file: {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {path}: expected lines of `name: value`, got {settings!r}")
    return settings


def _reject_unknown(settings: dict[str, Any], classes: Sequence[type], path: str | None) -> None:
    known = [f.name for cls in classes for f in dataclasses.fields(cls) if f.init]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config: {path}: unknown argument {name!r}{hint}")


def _group_help(parser: HfArgumentParser, classes: Sequence[type]) -> None:
    """Put a method's own settings before the hundred that come from the Trainer, in `--help`."""
    options = parser._optionals._group_actions
    for config in classes:
        if not issubclass(config, AnswerConfig):
            continue
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)} - _redefined(config)
        own = {f.name for f in dataclasses.fields(config)} - inherited
        for title, names in ((config.title, own), ("transformers.TrainingArguments", inherited)):
            group = parser.add_argument_group(title)
            for action in [a for a in options if a.dest in names]:
                options.remove(action)
                group._group_actions.append(action)


def _redefined(config: type[AnswerConfig]) -> set[str]:
    ours = [c for c in config.__mro__ if issubclass(c, AnswerConfig)]
    return {name for c in ours for name in inspect.get_annotations(c)}

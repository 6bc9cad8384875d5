"""Turn a command line and a YAML file into dataclasses of settings."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from latro.config.fields import kinds_of
from latro.config.precedence import by_precedence
from latro.config.training import ASSETS, AnswerConfig
from latro.terminal import one_line

# In a YAML file, or after "=", no shell has made a folder of "~".
_PATHS = {
    *("model_name_or_path", "dataset_name", "dataset_path", "output", "resume_from_checkpoint"),
    "vllm_weights_dir",
}


class _FileParser(HfArgumentParser):
    """Raises ValueError for bad input; the command line's own parser ends the process instead."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Once(yaml.SafeLoader):
    """Refuses a mapping that gives a name twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; raise ConstructorError where a name is there twice."""
        # Merged mappings give way to what is written beside them.
        given: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in given:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            given.add(key.value)
        return super().construct_mapping(node, deep)


class _AsWritten(_Once):
    """Reads every scalar but null as text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _WithExponents(_Once):
    """Reads 1e-6 as a number; YAML 1.1 by itself takes only 1.0e-6 for one."""


_WithExponents.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_arguments(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    small_settings: str = "default.yaml",
) -> tuple[Any, ...]:
    """Return an instance of each class, filled from the command line, `--config` and the defaults.

    The command line wins over the YAML file of `--config`, and that over the defaults. A given
    setting also removes weaker settings that would overrule it or that belong to what it replaces
    (`latro.config.precedence`).

    The YAML file takes the names and values of the command line, and lists, mappings and null.
    Without `--model_name_or_path` the commands use the small model that ships, and the settings
    made for it (`small_settings`, a file in `latro/assets`) replace the defaults.

    Raises:
        ValueError: an argument is unknown or not UTF-8, or the YAML file is missing, malformed,
            gives a name twice or has a value that its argument does not take; or there are several
            files.
    """
    # argparse's own usage message would fill four screens.
    usage = f"{prog} [--config FILE] [--NAME VALUE ...]"
    parser = HfArgumentParser(classes, prog=prog, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of arguments; the command line wins over it.")
    _group_help(parser, classes)
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        # Python has bytes of other encodings in as surrogates, which safetensors and JSON refuse
        # when the run has ended.
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(f"arguments: expected text in UTF-8, got {word!r}")
    named, _ = _preparse(argv)
    if len(named.config or ()) > 1:
        raise ValueError(
            f"--config: expected one file, got {', '.join(named.config)}, of which only the last "
            "would be read"
        )
    path = os.path.expanduser(named.config[0]) if named.config else None
    file = _parse_yaml(classes, _read_yaml(path), path) if path else {}
    small = {}
    if named.model_name_or_path is None and file.get("model_name_or_path") is None:
        ships = ASSETS / small_settings
        known = {f.name for cls in classes for f in dataclasses.fields(cls)}
        small = {k: v for k, v in _read_yaml(ships).items() if k in known}
        small = _parse_yaml(classes, small, ships)
    # These defaults are for --help; given settings win over them below.
    parser.set_defaults(**small | file)
    settings = by_precedence(small, file, _given(parser, argv))
    for name in _PATHS & settings.keys():
        if isinstance(settings[name], str):
            settings[name] = os.path.expanduser(settings[name])
    parsed = tuple(
        cls(**{f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings})
        for cls in classes
    )
    for part in parsed:
        # accelerate's own configuration names a precision too, and transformers takes that one
        # where both bf16 and fp16 are false.
        if isinstance(part, TrainingArguments) and settings.get(part.mixed_precision) is False:
            part.mixed_precision = "no"
    return parsed


def _given(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the command line itself gives, by field, without any default."""
    absent = object()
    names = {action.dest: absent for action in parser._actions}
    # argparse fills in a default only where the namespace lacks the name.
    parsed, unknown = parser.parse_known_args(argv, argparse.Namespace(**names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown argument {' '.join(unknown)}{hint}")
    return {name: value for name, value in vars(parsed).items() if value is not absent}


def _preparse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append")
    first.add_argument("--model_name_or_path", "--model-name-or-path")
    return first.parse_known_args(argv)


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a file's arguments: scalars as text (`no` is not false), mappings by YAML."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        written = yaml.load(text, _AsWritten)
        typed = yaml.load(text, _WithExponents)
    except FileNotFoundError:
        raise ValueError(f"--config: no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError comes from bytes that are not UTF-8 or an impossible date, RecursionError from
        # deeply nested brackets.
        raise ValueError(f"--config: {path} is not YAML: {one_line(str(error))}") from error
    if not isinstance(written, dict):
        raise ValueError(f"--config: {path}: expected lines of `name: value`, got {written!r}")
    return {k: typed.get(k, v) if isinstance(v, dict) else v for k, v in written.items()}


def _parse_yaml(
    classes: Sequence[type], arguments: dict[str, Any], path: str | os.PathLike[str]
) -> dict[str, Any]:
    """Return the values by the names of their fields, with text read as on the command line."""
    parser = _FileParser(classes, add_help=False, allow_abbrev=False)
    # Options that take no value are of the form --no_NAME.
    options = {o: a for o, a in parser._option_string_actions.items() if a.nargs != 0}
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    settings = {}
    for name, value in arguments.items():
        option = options.get(f"--{name}")
        if option is None:
            near = difflib.get_close_matches(
                str(name), [o.removeprefix("--") for o in options], n=1
            )
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config: {path}: unknown argument {name!r}{hint}")
        if option.dest in settings:
            raise ValueError(f"--config: {path}: {option.dest} is given twice, as {name} too")
        if isinstance(value, str):
            try:
                parsed, _ = parser.parse_known_args([f"--{name}={value}"])
            except ValueError as error:
                raise ValueError(f"--config: {path}: {error}") from error
            settings[option.dest] = getattr(parsed, option.dest)
        elif type(value) in _classes(hints[option.dest]):
            settings[option.dest] = value
        else:
            raise ValueError(f"--config: {path}: argument {name} does not take {value!r}")
    return settings


def _classes(hint: Any) -> set[type]:
    """Return the classes of values that an annotation admits."""
    return {get_origin(kind) or kind for kind in kinds_of(hint)}


def _group_help(parser: HfArgumentParser, classes: Sequence[type]) -> None:
    """Put a method's own settings before the Trainer's hundred in `--help`."""
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

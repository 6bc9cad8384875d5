"""Turn a record of a user's own data into a row.

A record may hold:

    prompt         a string, or a list of {"role", "content"} messages, the last of the user; a
                   list may be spelled as JSON, as in a cell of CSV
    answer         a string or a number: what is trained on, behind the answer template
    rationale      a string, or nothing: the worked solution
    ground_truth   a string or a number: what completions are graded against, if not `answer`
    choices        a list of texts, which are labelled A, B, ..., or {"label": [...], "text": [...]}

Other columns are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_REQUIRED = ("prompt", "answer")
_ROLES = ("system", "user", "assistant")
# A list of messages, spelled in JSON or in Python.
_SPELLED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content)\1\s*:""")
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def own_row(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the row of a record: "prompt" and "answer", and the optional columns that it fills.

    Raises:
        ValueError: a column is missing or malformed; the message begins with `where`.
    """
    if any(field not in record for field in _REQUIRED):
        raise ValueError(
            f"{where}: expected the columns prompt and answer, got {', '.join(map(str, record))}"
        )
    row: dict[str, Any] = {
        "prompt": _prompt(record["prompt"], where),
        "answer": _answer(record, "answer", where),
    }
    if not _absent(record.get("ground_truth")):
        row["ground_truth"] = _answer(record, "ground_truth", where)
    rationale = record.get("rationale")
    if rationale is not None and not isinstance(rationale, str):
        raise ValueError(f"{where}: expected a string at 'rationale', got {rationale!r}")
    if rationale and rationale.strip():
        row["rationale"] = rationale.strip()
    if not _absent(record.get("choices")):
        row["choices"] = _choices(record["choices"], where)
    for field, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a pair, "\\ud83d"
            raise ValueError(
                f"{where}: expected Unicode text at {field!r}, got a lone surrogate in {value!r}"
            ) from error
    return row


def _absent(value: Any) -> bool:
    """Return whether a cell is empty: None, or an empty cell of CSV."""
    return value is None or value == ""


def _prompt(prompt: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and _SPELLED_MESSAGES.match(prompt):
        try:
            prompt = json.loads(prompt)
        except (ValueError, RecursionError) as error:  # pandas writes them as Python does
            raise ValueError(
                f"{where}: expected messages as JSON at 'prompt', got {prompt!r}"
            ) from error
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: expected a non-empty string at 'prompt', got {prompt!r}")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{where}: expected a string or a list of messages at 'prompt', got {prompt!r}"
        )
    messages = [_message(message, f"{where}: message {i}") for i, message in enumerate(prompt)]
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"{where}: expected the last message to be the user's, got {messages[-1]['role']!r}"
        )
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with role and content, got {message!r}")
    # Arrow gives every message the keys of all messages, with None where a message lacks one.
    keys = {key for key, value in message.items() if value is not None}
    if keys != {"role", "content"}:
        raise ValueError(f"{where}: expected role and content, got {sorted(map(str, keys))}")
    if message["role"] not in _ROLES:
        raise ValueError(
            f"{where}: expected a role of {', '.join(_ROLES)}, got {message['role']!r}"
        )
    content = message["content"]
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: expected a non-empty string at 'content', got {content!r}")
    return {"role": message["role"], "content": content}


def _answer(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record[field]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = Decimal(str(value))
        # The answer is trained on, so 0.00001 must not become "1e-05".
        text = format(number, "f") if number.is_finite() else ""
    else:
        text = value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a non-empty string at {field!r}, got {value!r}")
    return text.strip()


def _choices(choices: Any, where: str) -> dict[str, list[str]]:
    if isinstance(choices, str):  # a cell of CSV
        try:
            choices = json.loads(choices)
        except (ValueError, RecursionError) as error:  # not JSON, or too long or too deep
            raise ValueError(f"{where}: expected JSON at 'choices', got {choices!r}") from error
    if isinstance(choices, list):
        choices = {"label": list(_LABELS[: len(choices)]), "text": choices}
    if not isinstance(choices, dict):
        raise ValueError(
            f"{where}: expected a list of texts, or an object with label and text, at 'choices'; "
            f"got {choices!r}"
        )
    labels, texts = _strings(choices, "label", where), _strings(choices, "text", where)
    if len(labels) != len(texts) or not 2 <= len(texts) <= len(_LABELS):
        raise ValueError(
            f"{where}: expected 2 to {len(_LABELS)} choices, a label and a text each; "
            f"got {len(labels)} labels and {len(texts)} texts"
        )
    distinct = {label.upper() for label in labels if re.fullmatch(r"\w", label)}
    if len(distinct) < len(labels):
        raise ValueError(f"{where}: expected a letter or digit of its own a label, got {labels}")
    return {"label": labels, "text": texts}


def _strings(choices: Mapping[str, Any], field: str, where: str) -> list[str]:
    values = choices.get(field)
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(
            f"{where}: expected a list of strings as the choices' {field}, got {values!r}"
        )
    return values

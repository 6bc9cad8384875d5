"""Render chat templates in a process of its own, under limits; see `chat_template`.

A chat template is a program that comes with a model. It may loop for ever, or ask in one call for
more memory than there is, and nothing in the same process could stop it. In this process the
operating system does, by a limit on memory and one on processor time per rendering; other work on
the machine does not count towards it.

The argument is sys.path as JSON. Each line of the standard input holds the arguments of one
rendering as JSON, or {"arguments_of": ...} with a template. The reply is a line of JSON:
{"texts": [...]}, {"arguments": [...]} with the names of what the template reads from outside,
{"refusal": ...} where the template raises an error, or {"excess": ...} where it exceeds a limit,
after which this process may be gone. Whatever modules print on import goes to the standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from types import TracebackType

SECONDS = 5
MEMORY_BYTES = 2 << 30
CHARACTERS = 1 << 24

# The errors that a template's expressions may raise, besides Jinja's own.
FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**reply: str | list[str]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    sys.path[:] = json.loads(sys.argv[1])
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    def tell(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        memory = f"takes more than {MEMORY_BYTES >> 30} GiB of memory"
        answer(excess=memory if kind is MemoryError else f"fails with {kind.__name__}: {error}")

    sys.excepthook = tell
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for line in sys.stdin:
        request = json.loads(line)
        limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + SECONDS)
        try:
            if request.keys() == {"arguments_of"}:
                template = request["arguments_of"]
                # With the tags that transformers adds to Jinja's.
                tree = _compile_jinja_template(template).environment.parse(template)
                answer(arguments=sorted(meta.find_undeclared_variables(tree)))
                continue
            texts, _ = render_jinja_template(**request)
        except (TemplateError, *FAULTS) as error:
            # A template raises Jinja's own class to tell something; other errors need their name.
            said = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            answer(refusal=f"{said}{error}")
            continue
        characters = sum(map(len, texts))
        if characters <= CHARACTERS:
            answer(texts=texts)
        else:
            answer(excess=f"renders {characters} characters, more than {CHARACTERS}")


def limit(what: int, amount: int) -> None:
    """Lower a limit of this process to `amount`, or to the allowed maximum if that is less."""
    _, hard = resource.getrlimit(what)
    allowed = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(what, (allowed, hard))


if __name__ == "__main__":
    main()

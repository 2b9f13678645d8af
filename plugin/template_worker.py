"""Renders chat templates in a process of its own: a template is a program that came with a file.

Knows jinja2's sandbox and the limits that the operating system keeps. Does not import superego.
Reads requests and writes answers, a JSON line each; ends with its input.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules are not to be found under their bare names

import contextlib
import datetime
import json
import signal
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0  # of processor time, one request
MEMORY = 256 << 20  # bytes of address space
OUTPUT = 16 << 20  # characters of one rendering

# What templates raise that try what they may not, beside jinja2's own errors
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
)


class _Refused(Exception):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks replies for training, changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:500])


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which prompts must not have
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    # A fixed day: a template that prints today's date must not change a compile.
    day = datetime.datetime(2026, 1, 1)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=day.strftime)
    environment.filters["tojson"] = _tojson
    return environment


def _check_constants(environment: jinja2.Environment, source: str) -> None:
    """Raise MemoryError for constant expressions such as 'a' * 10 ** 10.

    Compiling computes them, and passes over a failure to; where nothing limits the memory, as
    in llama-cpp-python, it would not fail.
    """
    context = jinja2.nodes.EvalContext(environment)
    for node in environment.parse(source).find_all(jinja2.nodes.Expr):
        try:
            node.as_const(context)
        except jinja2.nodes.Impossible as error:
            if isinstance(error.__cause__ or error.__context__, MemoryError):
                raise MemoryError from None


def _render(template: jinja2.Template, values: dict[str, Any]) -> dict[str, Any]:
    pieces, length = [], 0
    for piece in template.generate(values):
        pieces.append(piece)
        length += len(piece)
        if length > OUTPUT:
            return {"limit": f"writes more than {OUTPUT:,} characters"}
    return {"text": "".join(pieces)}


def _answer(templates: list[jinja2.Template], request: dict[str, Any]) -> dict[str, Any]:
    """To `source`: its number. To `number` and `values`: the text, or what was wrong."""
    try:
        if "source" in request:
            environment = _environment()
            _check_constants(environment, request["source"])
            templates.append(environment.from_string(request["source"]))
            return {"number": len(templates) - 1}
        return _render(templates[request["number"]], request["values"])
    except _Refused as error:
        return {"refused": str(error)}
    except _FAILURES as error:
        return {"error": f"{error}"[:500] or type(error).__name__}
    except MemoryError:
        return {"limit": f"needs more than {MEMORY >> 20} MB"}


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer until the input ends; ends by SIGPROF where a request takes too long."""
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    _limit_memory()
    timer = getattr(signal, "setitimer", None)
    templates: list[jinja2.Template] = []
    for line in sys.stdin:
        request = json.loads(line)
        if timer:
            timer(signal.ITIMER_PROF, SECONDS)
        answer = json.dumps(_answer(templates, request))
        if timer:
            timer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()

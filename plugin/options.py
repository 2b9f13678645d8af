"""Options, arguments and output that commands share.

Knows click and how results are shown. Holds no command.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from superego import completion
from superego.adapter import Adapter, read_adapter, same_weights, split_scale
from superego.base import BaseModel
from superego.claims import claimed
from superego.errors import SuperegoError, printable
from superego.persona import Persona

F = TypeVar("F", bound=Callable[..., Any])
EFFORTS = ["quick", "standard", "thorough"]
MAX_THREADS = 512  # llama.cpp ends the process on more
_MAX_PROMPTS = 1 << 20  # bytes


class OutputPath(click.Path):
    """A file that the command writes, which no other superego may write meanwhile."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if ctx is not None and not ctx.resilient_parsing:
            ctx.with_resource(claimed(path))
        return path


class FiniteRange(click.FloatRange):
    """Numbers in a range; not nan, which is in every range as comparisons go."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def base_option(command: F) -> F:
    return click.option(
        "--base",
        required=True,
        metavar="BASE",
        shell_complete=completion.bases,
        help="A GGUF file, 'smollm2' (extra demo) or 'ollama:NAME[:TAG]'.",
    )(command)


def persona_argument(command: F) -> F:
    """PERSONA, an adapter's file."""
    return click.argument(
        "persona", type=click.Path(path_type=Path), shell_complete=completion.adapters
    )(command)


output_option = click.option("-o", "--output", required=True, type=OutputPath(), metavar="OUT.gguf")
effort_option = click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    help="That of the adapter by default.",
)
by_option = click.option(
    "--by", metavar="NAME", help="Who did it, for the log; your login name by default."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), help="Processors to use; all by default."
)
n_ctx_option = click.option(
    "--n-ctx",
    type=click.IntRange(64, 1 << 24),
    default=4096,
    show_default=True,
    help="Tokens of a conversation.",
)
gpu_layers_option = click.option(
    "--gpu-layers",
    type=click.IntRange(-1, 1 << 16),
    default=-1,
    show_default=True,
    help="Layers on the GPU, where llama.cpp was built for one (Metal on macOS); -1: all.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "mps", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where torch computes; auto: cuda, then mps, then cpu (mps has not been run).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def converter(name: str) -> Any:
    """A converters module; they need torch, which the run-time side does without."""
    import importlib

    try:
        return importlib.import_module(f"superego.converters.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("superego"):
            raise
        raise SuperegoError(
            f"this command needs {error.name}, which is not installed; "
            "pip install 'superego[convert]'"
        ) from None


def parse_persona(text: str) -> tuple[Adapter, float]:
    """FILE or FILE:SCALE; a name with a colon of its own is taken as it is if it exists."""
    path, scale = split_scale(text)
    return read_adapter(path), 1.0 if scale is None else scale


def lines_of(path: Path) -> list[str]:
    """The prompts of a file, one a line; raises SuperegoError."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_PROMPTS + 1)
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuperegoError(f"{path}: cannot be read as text: {error}") from None
    if len(raw) > _MAX_PROMPTS:
        raise SuperegoError(f"{path}: over {_MAX_PROMPTS:,} bytes of prompts")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise SuperegoError(f"{path}: holds no prompts (expected one a line)")
    return found


def warn_other_weights(adapter: Persona, model: BaseModel) -> None:
    if same_weights(adapter, model) is False:
        click.echo(
            f"Note: {adapter.path} fits {model.path} but was made from a file with other "
            "weights; expect less. Compile it for this base.",
            err=True,
        )


def use_it(base: str, persona: Path) -> None:
    """The command that uses what was built, on stderr."""
    quoted = shlex.quote(str(persona))
    click.echo(f"Use it:\n  superego chat --base {base} --persona {quoted}", err=True)


def say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


def table(values: dict[str, Any]) -> str:
    width = max((len(str(k)) for k in values), default=0)
    rows = (f"{k!s:<{width}}  {_value(v)}" for k, v in values.items())
    return "\n".join(printable(row, "\n\t") for row in rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return str(value)

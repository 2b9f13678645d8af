"""The vector command: a manifesto as a control vector.

Knows options and output. The work is in `superego.converters.vector`.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego.atomic import check_writable
from superego.base import open_base
from superego.bundled import find_manifesto
from superego.errors import SuperegoError
from superego.options import (
    base_option,
    converter,
    json_option,
    output_option,
    table,
    threads_option,
)
from superego.progress import Steps


@click.command()
@click.argument("manifesto")
@base_option
@output_option
@click.option(
    "--effort",
    type=click.Choice(["quick", "standard", "thorough"]),
    default="standard",
    show_default=True,
    help="How many references.",
)
@click.option(
    "--scale", type=float, help="Of the mean differences; tuned on unseen references by default."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@threads_option
@json_option
@click.option("--no-cache", is_flag=True, help="Neither read nor write cached references.")
def vector(
    manifesto: str,
    base: str,
    output: Path,
    effort: str,
    scale: float | None,
    seed: int,
    threads: int | None,
    as_json: bool,
    no_cache: bool,
) -> None:
    """Compute a control vector from MANIFESTO: small and weak; 'compile' recovers more."""
    text = find_manifesto(manifesto)
    model = open_base(base)
    if scale is not None and not 0 < abs(scale) <= 100:
        raise SuperegoError(f"--scale {scale:g}: expected a number from -100 to 100 that is not 0")
    check_writable(output, Path(manifesto))
    compiler = converter("compile")
    speed = compiler.speed_for(effort, threads)
    settings = compiler.Settings.for_effort(effort, None, seed, speed)
    with Steps() as steps:
        result = converter("vector").make_vector(
            text, model, output, settings, scale, threads, not no_cache, steps
        )
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    click.echo(
        f"Use it:\n  superego chat --base {base} --persona {output}\n"
        f"  llama-server -m {model.path} --control-vector {output} -cram 0",
        err=True,
    )

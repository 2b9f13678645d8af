"""Commands that change an adapter without a new manifesto: blend, calibrate, move.

Knows options and output. Holds no logic of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego import completion
from superego.adapter import check_fit, read_adapter
from superego.base import open_base
from superego.claims import claimed
from superego.errors import SuperegoError
from superego.options import (
    FiniteRange,
    OutputPath,
    base_option,
    by_option,
    converter,
    effort_option,
    json_option,
    output_option,
    parse_persona,
    persona_argument,
    table,
    threads_option,
    use_it,
    warn_other_weights,
)
from superego.progress import Steps


@click.command()
@click.argument(
    "personas",
    nargs=-1,
    required=True,
    metavar="A[:SCALE] B[:SCALE]...",
    shell_complete=completion.adapters,
)
@output_option
@click.option("--rank", type=click.IntRange(1, 4096), help="Cut to this rank; exact by default.")
@by_option
@json_option
def blend(
    personas: tuple[str, ...], output: Path, rank: int | None, by: str | None, as_json: bool
) -> None:
    """Write one adapter that does what several do together, each at its scale."""
    from superego.blend import blend as write

    if len(personas) < 2 and rank is None:
        raise SuperegoError("blend needs two adapters or more (or one with --rank)")
    parts = [parse_persona(text) for text in personas]
    result = write(parts, output, rank, by)
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else table(result))
    use_it("BASE", output)


@click.command()
@persona_argument
@base_option
@click.option(
    "--limit",
    type=FiniteRange(0, min_open=True),
    metavar="DRIFT",
    help="The most off-target drift, nats; the system message's own by default.",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    metavar="OUT.gguf",
    help="PERSONA itself by default.",
)
@by_option
@threads_option
@json_option
def calibrate(
    persona: Path,
    base: str,
    limit: float | None,
    output: Path | None,
    by: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find the scale at which PERSONA recovers most within a drift limit, and store it.

    From then on scale 1 means that scale, in every runtime.
    """
    from superego.calibrate import calibrate as find

    adapter = read_adapter(persona)
    model = open_base(base)
    check_fit(adapter, model.header)
    warn_other_weights(adapter, model)
    path = output or persona
    with claimed(path), Steps() as steps:
        result = find(adapter, model, path, limit, threads=threads, by=by, progress=steps.update)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        points = result.pop("points")
        click.echo(table(result))
        click.echo("\nscale  KL recovered  drift")
        for point in points:
            drift = "" if point["drift"] is None else f"{point['drift']:.4f}"
            click.echo(f"{point['scale']:>5g}  {point['KL recovered']:>12.4f}  {drift}".rstrip())
    use_it(base, path)


@click.command()
@persona_argument
@base_option
@output_option
@click.option(
    "--margin",
    type=FiniteRange(0, 1),
    default=0.05,
    show_default=True,
    help="KL recovered that may be lost before it is recompiled.",
)
@effort_option
@by_option
@threads_option
@json_option
def move(
    persona: Path,
    base: str,
    output: Path,
    margin: float,
    effort: str | None,
    by: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write PERSONA for another base: measured and reused if still good, else recompiled."""
    adapter = read_adapter(persona)
    model = open_base(base)
    module = converter("move")
    with Steps() as steps:
        result = module.move(adapter, model, output, margin, effort, by, threads, steps)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    use_it(base, output)

"""The command `report`: one page that shows how near adapters are to their system messages.

Knows options and output. Holds no logic of its own.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from superego import completion
from superego.adapter import check_fit
from superego.base import open_base
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.options import (
    OutputPath,
    base_option,
    json_option,
    lines_of,
    parse_persona,
    table,
    threads_option,
    warn_other_weights,
)
from superego.progress import Steps


@click.command()
@click.argument(
    "personas",
    nargs=-1,
    required=True,
    metavar="PERSONA[:SCALE]…",
    shell_complete=completion.adapters,
)
@base_option
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="OUT.html")
@click.option(
    "--ask",
    "asks",
    multiple=True,
    metavar="TEXT",
    help="A question whose replies are shown; repeatable. Four of the prompts by default.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="What is measured on, one a line; 32 of the bundled held-out ones by default.",
)
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=48, show_default=True)
@threads_option
@json_option
def report(
    personas: tuple[str, ...],
    base: str,
    output: Path,
    asks: tuple[str, ...],
    prompts: Path | None,
    max_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Show PERSONAs beside their manifestos as system messages, on one self-contained page."""
    from superego.atomic import check_writable, replacing
    from superego.history import manifesto_of
    from superego.report import gather
    from superego.report_page import render, summary

    model = open_base(base)
    wanted = [parse_persona(text) for text in personas]
    for adapter, _ in wanted:
        check_fit(adapter, model.header)
        manifesto_of(adapter)
        warn_other_weights(adapter, model)
    if output.suffix not in (".html", ".htm"):
        raise SuperegoError(f"{output}: expected a name that ends in .html")
    check_writable(output, *model.files, *(adapter.path for adapter, _ in wanted))
    if not all(ask.strip() for ask in asks):
        raise SuperegoError("--ask is empty; give a question")
    messages = lines_of(prompts) if prompts else None
    command = ["superego", "report", *personas, "--base", base, "-o", str(output)]
    command += [word for ask in asks for word in ("--ask", ask)]
    command += ["--prompts", str(prompts)] if prompts else []
    command += ["--max-tokens", str(max_tokens)]
    with Steps() as steps:
        found = gather(model, wanted, messages, asks, max_tokens, threads, steps.update)
    check_unchanged(model.header, *(adapter.header for adapter, _ in wanted))
    page = render(found, model, shlex.join(command), base)
    with replacing(output) as temporary:
        temporary.write_text(page, "utf-8")
    written = {"output": str(output), "bytes": output.stat().st_size}
    if as_json:
        figures = [{"name": each.name, **each.measures.as_dict()} for each in found]
        click.echo(json.dumps({**written, "personas": figures}, indent=2))
    else:
        click.echo(table(written))
        for each in found:
            click.echo(f"\n{each.name}\n{table(summary(each))}")
    click.echo(f"Open it:\n  {output.absolute().as_uri()}", err=True)

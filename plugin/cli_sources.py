"""The command `tag`: gives documents a provenance header.

Knows options and output. Holds no logic of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego.errors import SuperegoError
from superego.options import OutputPath, json_option, table
from superego.progress import Steps
from superego.provenance import KINDS, one_line

_SHOWN = 8  # of the documents that were skipped or are undated
_CHAT_BYTES = 100_000  # what may fit a context; more is a corpus


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--source", help="Who published them; needed unless every record names its own.")
@click.option(
    "--date", metavar="D", help="YYYY, YYYY-MM or YYYY-MM-DD; overrides the documents' own."
)
@click.option(
    "--kind",
    type=click.Choice(KINDS, case_sensitive=False),
    help="What they are; overrides a record's own. 'other' where nothing says.",
)
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="OUT.jsonl")
@click.option("--strict", is_flag=True, help="Stop at the first document that cannot be read.")
@json_option
@click.pass_context
def tag(
    ctx: click.Context,
    inputs: tuple[str, ...],
    source: str | None,
    date: str | None,
    kind: str | None,
    output: Path,
    strict: bool,
    as_json: bool,
) -> None:
    """Say where documents come from: header and JSON fields, one line a document.

    INPUT is a file (txt, md, html, pdf, jsonl), a folder or a quoted pattern. An interrupted
    run goes on where it was when the same command is given again. Exit code 1: some documents
    could not be read and were skipped.
    """
    from superego.dates import parse_date
    from superego.tag import Label, find_inputs, tag_documents

    if output.suffix != ".jsonl":
        raise SuperegoError(f"{output}: expected a name that ends in .jsonl")
    if source is not None and not one_line(source):
        raise SuperegoError("--source is empty; name who published the documents")
    day = None
    if date is not None:
        try:
            day = parse_date(date)
        except ValueError as error:
            raise SuperegoError(f"--date: {error} (expected YYYY, YYYY-MM or YYYY-MM-DD)") from None
    files, passed = find_inputs(inputs, output)
    label = Label(one_line(source) if source else None, kind, day)
    try:
        with Steps() as steps:
            report = tag_documents(
                files,
                output,
                label,
                strict,
                lambda done, total: steps.update("tagging", done, total),
                steps.note,
            )
    except KeyboardInterrupt:
        click.echo("Interrupted: give the same command again to go on.", err=True)
        ctx.exit(130)
    report["other_files"] = passed
    for name in ("skipped", "undated"):
        rows = report[f"{name}_list"]
        for row in rows[:_SHOWN]:
            click.echo(f"{name.capitalize()}: {row}", err=True)
        if report[name] > len(rows[:_SHOWN]):
            click.echo(f"{name.capitalize()}: {report[name] - _SHOWN:,} more", err=True)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(table({k: v for k, v in report.items() if not k.endswith("_list")}))
    if report["bytes"] <= _CHAT_BYTES:
        use = f"superego chat --base BASE --document {output} --system epistemics"
        click.echo(f"Use it:\n  {use}", err=True)
    if report["skipped"]:
        ctx.exit(1)

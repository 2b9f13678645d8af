"""Commands of the feedback loop: amend, log, diff, watch.

Knows options and output. Holds no logic of its own.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from superego import completion
from superego.adapter import check_fit, read_adapter
from superego.atomic import temporary_folder
from superego.base import open_base
from superego.errors import SuperegoError
from superego.manifesto import read_manifesto
from superego.options import (
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

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@persona_argument
@click.argument("amendment")
@base_option
@output_option
@effort_option
@by_option
@threads_option
@json_option
def amend(
    persona: Path,
    amendment: str,
    base: str,
    output: Path,
    effort: str | None,
    by: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Add AMENDMENT (a text or a file) to the manifesto in PERSONA and compile it anew.

    References that the new manifesto's teacher would still write are kept.
    """
    adapter = read_adapter(persona)
    module = converter("amend")
    text = module.amendment(amendment)
    model = open_base(base)
    check_fit(adapter, model.header)
    if "calibration.scale" in adapter.own:
        click.echo("Note: the calibration is not carried over; calibrate the result.", err=True)
    with Steps() as steps:
        result = module.amend(adapter, text, model, output, effort, by, threads, steps)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    use_it(base, output)
    if persona.absolute() != output.absolute():
        click.echo(f"  superego diff {persona} {output} --base {base}", err=True)


@click.command()
@persona_argument
@json_option
def log(persona: Path, as_json: bool) -> None:
    """Show what was done to PERSONA since its first compile, and by whom."""
    from superego.history import history_of

    entries = history_of(read_adapter(persona))
    if as_json:
        click.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    if not entries:
        click.echo("compiled; nothing was done to it since", err=True)
    for number, entry in enumerate(entries, 1):
        who = f" by {entry['by']}" if entry.get("by") else ""
        click.echo(f"{number}. {entry['date']} {entry['action']}{who}")
        for key, value in entry.items():
            if key not in ("action", "date", "by"):
                shown = str(value)[:12] if key.startswith("sha256") else value
                click.echo(f"     {key}: {shown}")


@click.command()
@click.argument("a", metavar="A[:SCALE]", shell_complete=completion.adapters)
@click.argument("b", metavar="B[:SCALE]", shell_complete=completion.adapters)
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completion.bases,
    help="Also compare what they make this base say.",
)
@click.option("--show", type=click.IntRange(0), default=3, show_default=True, metavar="N")
@threads_option
@json_option
def diff(a: str, b: str, base: str | None, show: int, threads: int | None, as_json: bool) -> None:
    """Show how the manifestos of two adapters differ, and with --base how their replies do."""
    from superego.diff import behaviour_diff, manifesto_diff

    first, second = parse_persona(a), parse_persona(b)
    lines = manifesto_diff(first[0], second[0])
    found: dict[str, Any] = {"manifesto": lines}
    if base is not None:
        model = open_base(base)
        for each, _ in (first, second):
            check_fit(each, model.header)
            warn_other_weights(each, model)
        with Steps() as steps:
            found |= behaviour_diff(
                first, second, model, show=show, threads=threads, progress=steps.update
            )
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    click.echo("\n".join(lines) if lines else "The manifestos are the same.")
    if base is None:
        return
    click.echo()
    rows = found.pop("by prompt")
    changed = found.pop("changed most")
    found.pop("manifesto")
    click.echo(table(found))
    click.echo("\nKL by prompt, nats a token")
    for row in rows:
        click.echo(f"  {row['KL']:.4f}  {row['prompt'][:80]}")
    for row in changed:
        click.echo(f"\n{row['prompt']}\n  A: {row['A'].strip()}\n  B: {row['B'].strip()}")


@click.command()
@click.argument("manifesto", type=click.Path(path_type=Path), shell_complete=completion.manifestos)
@base_option
@click.option("--ask", "questions", multiple=True, metavar="QUESTION", help="Asked at every save.")
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    metavar="OUT.gguf",
    help="Where the adapter is written at every save; a temporary file by default.",
)
@click.option("--turns", type=click.IntRange(1), metavar="N", help="Stop after N compiles.")
@threads_option
@json_option
def watch(
    manifesto: Path,
    base: str,
    questions: tuple[str, ...],
    output: Path | None,
    turns: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compile MANIFESTO at every save and show the old and the new reply side by side.

    Ctrl-C ends it. With --json every save is one line.
    """
    from rich.console import Console

    model = open_base(base)
    if not manifesto.exists():
        raise SuperegoError(f"{manifesto}: no such file (expected a Markdown manifesto)")
    if output is not None and output.exists() and output.samefile(manifesto):
        raise SuperegoError(f"{output}: is the manifesto itself; give another file with -o")
    module = converter("watch")
    asked = questions
    with suppress(SuperegoError):  # a broken file is told at its first turn, and watched on
        asked = asked or tuple(read_manifesto(manifesto).examples[:2])
    asked = asked or ("Who are you, and what matters to you?",)
    console = Console()
    done = 0
    with temporary_folder() as folder, suppress(KeyboardInterrupt):
        path = output or folder / f"{manifesto.stem}.gguf"
        workshop = module.Workshop(model, path, asked, threads=threads, quiet=False)
        for event in module.watch(manifesto, workshop, threading.Event()):
            if isinstance(event, module.Problem):
                click.echo(f"Error: {event.message}", err=True)
                continue
            if as_json:
                line = {**asdict(event), "manifesto": event.manifesto.sha256}
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                _show(console, event)
            done += 1
            if turns is not None and done >= turns:
                break
            click.echo(f"Watching {manifesto}; Ctrl-C ends.", err=True)
    if output is not None and done:
        use_it(base, output)


def _show(console: Console, turn: Any) -> None:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    width = max(20, (console.width - 2) // 2)
    for question, before, now in turn.replies:
        console.print(Text(question, style="bold"))
        panels = [
            Panel(Text(text or "(nothing)"), title=title, width=width)
            for title, text in (("before", before), ("now", now))
        ]
        console.print(Columns(panels))
    stages = ", ".join(f"{name} {value:.1f}" for name, value in turn.seconds.items())
    console.print(
        Text(
            f"KL recovered {turn.recovered:.3f}; {turn.kept} of {turn.references} references kept\n"
            f"seconds: {stages}"
        )
    )

"""Commands for the user's own personas, which other programs find by name.

Knows options and output. The work is in `superego.library`.
"""

from __future__ import annotations

import click

from superego import completion, library
from superego.adapter import check_fit
from superego.base import open_base
from superego.options import base_option, parse_persona, warn_other_weights


@click.command()
@click.argument("persona", metavar="PERSONA[:SCALE]", shell_complete=completion.adapters)
@base_option
@click.option("--name", help="Instead of the name in the adapter.")
def add(persona: str, base: str, name: str | None) -> None:
    """Keep a compiled persona under its name, for llm -m persona/NAME."""
    adapter, scale = parse_persona(persona)
    model = open_base(base)
    check_fit(adapter, model.header)
    warn_other_weights(adapter, model)
    entry = library.keep(adapter.path, name or adapter.name, base, scale)
    click.echo(entry.adapter)
    click.echo(f"Use it:\n  llm -m persona/{entry.name} 'Hello!'", err=True)


@click.command()
@click.argument("name", shell_complete=completion.kept)
def remove(name: str) -> None:
    """Forget a persona that was added."""
    library.forget(name)

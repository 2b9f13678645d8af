"""Commands for Ollama: a folder that it takes, and creating the model on a server.

Knows options and output. The work is in `superego.converters.ollama_folder` and
`superego.ollama_server`.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego import completion
from superego.base import open_base
from superego.bundled import find_manifesto
from superego.cli_merge import keep_option, rounding_option, type_option
from superego.errors import SuperegoError
from superego.options import (
    OutputPath,
    base_option,
    converter,
    json_option,
    parse_persona,
    table,
    threads_option,
    warn_other_weights,
)
from superego.progress import Steps


@click.command("ollama")
@click.argument("persona", metavar="PERSONA[:SCALE]", shell_complete=completion.personas)
@base_option
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="DIR")
@click.option(
    "--system",
    "as_system",
    is_flag=True,
    help="The manifesto as a SYSTEM line instead; PERSONA may be a manifesto.",
)
@click.option(
    "--ollama-version", metavar="X.Y.Z", help="Instead of asking the running server for it."
)
@type_option
@keep_option
@rounding_option
@threads_option
@json_option
def export_ollama(
    persona: str,
    base: str,
    output: Path,
    as_system: bool,
    ollama_version: str | None,
    kind: str,
    keep: bool,
    rounding: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a folder that 'ollama create' takes.

    Ollama before 0.34.1 gets the base and the adapter; later ones refuse adapters and get a
    merged model.
    """
    from superego.modelfile import dropped
    from superego.ollama_server import parse_version, server_version

    folders = converter("ollama_folder")
    model = open_base(base)
    if as_system:
        if persona.rpartition(":")[0].endswith(".gguf") or persona.endswith(".gguf"):
            text = parse_persona(persona)[0].own.get("manifesto")
            if not isinstance(text, str):
                raise SuperegoError(f"{persona}: holds no superego.manifesto; give the manifesto")
        else:
            text = find_manifesto(persona).body
        if lost := dropped(text):
            click.echo(
                f"Note: Ollama drops characters it cannot print, here U+{ord(lost[0]):04X}"
                f"{' and others' if len(lost) > 1 else ''}.",
                err=True,
            )
        result = folders.export_system(text, base, output)
    else:
        adapter, scale = parse_persona(persona)
        version = parse_version(ollama_version) if ollama_version else server_version()
        warn_other_weights(adapter, model)
        plan = converter("merge").Plan(adapter, scale, kind, keep, rounding)
        with Steps() as steps:
            result = folders.export_adapter(plan, model, base, output, version, threads, steps)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    name = output.absolute().name
    click.echo(
        f"Use it:\n  ollama create {name} -f {output / 'Modelfile'}\n  ollama run {name}\n"
        f"or, over the network (OLLAMA_HOST):\n  superego ollama push {output} {name}",
        err=True,
    )


@click.group()
def ollama() -> None:
    """Talk with a running Ollama server (OLLAMA_HOST, else 127.0.0.1:11434)."""


@ollama.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("name")
def push(folder: Path, name: str) -> None:
    """Create the model NAME on the server from an exported DIR."""
    from superego.modelfile import NAME, read_modelfile
    from superego.ollama_server import push as send

    recipe = read_modelfile(folder / NAME)
    with Steps() as steps:
        for status in send(folder, recipe, name, steps.update):
            click.echo(status)
    click.echo(f"Use it:\n  ollama run {name}", err=True)

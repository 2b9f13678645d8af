"""The command `export llama-server`: the exact command and requests for a stock llama-server.

Knows options and what is printed and written. Does not start anything.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from superego import completion
from superego.atomic import replacing
from superego.base import BaseModel, open_base
from superego.errors import SuperegoError
from superego.options import (
    OutputPath,
    base_option,
    json_option,
    n_ctx_option,
    threads_option,
    warn_other_weights,
)

if TYPE_CHECKING:
    from superego.roster import Roster

_MESSAGE = "Who are you?"


@click.command("llama-server")
@click.argument(
    "personas", nargs=-1, required=True, metavar="PERSONA...", shell_complete=completion.personas
)
@base_option
@click.option("-o", "--output", type=OutputPath(), metavar="DIR", help="Also write them there.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--parallel", type=click.IntRange(1, 256), default=4, show_default=True)
@n_ctx_option
@click.option(
    "--alora",
    is_flag=True,
    help="Write the adapters as activated LoRA (needs -o): they act from the reply's header on.",
)
@threads_option
@json_option
def export_llama_server(
    personas: tuple[str, ...],
    base: str,
    output: Path | None,
    port: int,
    parallel: int,
    n_ctx: int,
    alora: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Print the llama-server command that serves PERSONAs, and a request for each.

    PERSONA is as for serve. llama-server itself keeps no personas apart: each request has to
    name every adapter with its scale, as the printed ones do. `superego serve` does it for you.
    """
    from superego.llama_server import Settings, options
    from superego.roster import base_name, read_roster
    from superego.runtime import default_threads

    model = open_base(base)
    roster = read_roster(model, base_name(base, model), personas)
    if alora and output is None:
        raise SuperegoError("--alora writes adapters: give the folder with -o DIR")
    for persona in roster.personas.values():
        if persona.adapter is not None:
            warn_other_weights(persona.adapter, model)
    if output is not None:
        _make_folder(output)
    roster = _at_scale_1(roster, output)
    adapters = roster.adapters
    if alora and output is not None:
        adapters = _activated(model, adapters, output)
    settings = Settings(parallel, n_ctx, threads or default_threads())
    command = ["llama-server", *options(model.path, adapters, settings), "--port", str(port)]
    requests = {}
    for name, persona in roster.personas.items():
        body: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": _MESSAGE}],
        }
        roster.rewrite(body, chat=True)
        del body["model"]  # llama-server has one, whatever it is called
        # what is kept is another persona's only where activated adapters colour each other's
        body["cache_prompt"] = not (alora and persona.adapter is not None and len(adapters) > 1)
        requests[name] = body
    texts = {
        "llama-server.sh": "#!/bin/sh\nexec " + shlex.join(command) + "\n",
        **{f"request-{_file_name(name)}.json": _pretty(body) for name, body in requests.items()},
    }
    if output is not None:
        for file_name, text in texts.items():
            with replacing(output / file_name) as temporary:
                temporary.write_text(text, "utf-8")
        (output / "llama-server.sh").chmod(0o755)
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    if as_json:
        click.echo(json.dumps({"command": command, "address": address, "requests": requests}))
        return
    click.echo(shlex.join(command))
    for body in requests.values():
        sent = shlex.quote(json.dumps(body, ensure_ascii=False))
        click.echo(f"curl {address} -H 'Content-Type: application/json' -d {sent}")
    if output is not None:
        click.echo(f"Use it:\n  {output / 'llama-server.sh'}", err=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SuperegoError(f"{folder}: cannot be made: {error.strerror}") from None


def _at_scale_1(roster: Roster, folder: Path | None) -> Roster:
    """Adapters with a slot that are to act at another scale as copies that mean it at 1.

    llama-server would scale the slot too, which acts as a whole.
    """
    from superego.adapter import read_adapter
    from superego.pairs import copy_adapter, has_slot

    personas = dict(roster.personas)
    for name, persona in personas.items():
        adapter = persona.adapter
        if adapter is None or persona.scale in (0.0, 1.0) or not has_slot(adapter):
            continue
        if folder is None:
            raise SuperegoError(
                f"{adapter.path}: acts at {persona.scale:g} in llama-server only as a copy that "
                "is written for it: give the folder with -o DIR"
            )
        target = folder.absolute() / f"{_file_name(name)}.gguf"
        if target.exists() and target.samefile(adapter.path):
            raise SuperegoError(f"{adapter.path}: would be written onto itself; give another -o")
        copy_adapter(adapter, target, {}, strength=persona.scale)
        personas[name] = replace(persona, adapter=read_adapter(target), scale=1.0)
    files = dict.fromkeys(p.adapter.path for p in personas.values() if p.adapter is not None)
    return replace(roster, personas=personas, adapters=list(files))


def _activated(model: BaseModel, adapters: list[Path], folder: Path) -> list[Path]:
    """Activated copies of the adapters in a folder, in order."""
    from superego.adapter import read_adapter
    from superego.alora import invocation_tokens, write_activated
    from superego.pairs import has_slot
    from superego.runtime import load
    from superego.template import ChatTemplate

    invocation = invocation_tokens(load(model, vocab_only=True), ChatTemplate(model.header))
    names = [f"{path.stem}.alora.gguf" for path in adapters]
    if len(set(names)) != len(names):
        raise SuperegoError("two adapters of one file name cannot both go to one folder; rename")
    made = [folder.absolute() / name for name in names]
    for path, target in zip(adapters, made, strict=True):
        if target.exists() and target.samefile(path):
            raise SuperegoError(f"{path}: would be written onto itself; give another folder")
        adapter = read_adapter(path)
        write_activated(adapter, invocation, target)
        if has_slot(adapter):
            click.echo(
                f"Note: {path} acts on the conversation's first tokens too, which --alora leaves "
                "to the base; expect a small part of the persona.",
                err=True,
            )
    return made


def _file_name(name: str) -> str:
    return name.replace(":", "-")


def _pretty(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"

"""The command `serve`: one base and its personas at an OpenAI-compatible address.

Knows options and what is printed. Holds no logic of its own.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import click

from superego import completion
from superego.atomic import temporary_folder
from superego.base import open_base
from superego.errors import SuperegoError
from superego.options import (
    base_option,
    gpu_layers_option,
    json_option,
    n_ctx_option,
    threads_option,
    warn_other_weights,
)


@click.command()
@click.argument("personas", nargs=-1, metavar="PERSONA...", shell_complete=completion.personas)
@base_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one."
)
@click.option(
    "--api-key",
    envvar="SUPEREGO_API_KEY",
    show_envvar=True,
    help="Needed on every address but loopback.",
)
@click.option(
    "--allow-host",
    "host_names",
    multiple=True,
    metavar="NAME",
    help="A name that clients may call this machine by; may be given several times.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Replies written at once.",
)
@n_ctx_option
@click.option(
    "--max-body", type=click.IntRange(1024), default=4 << 20, show_default=True, help="Bytes."
)
@click.option(
    "--exact/--no-exact",
    default=None,
    help="A reply at temperature 0 does not depend on what else is being served, bit for bit; "
    "reads prompts a little slower. For CPUs, and the default where llama-server has no GPU.",
)
@click.option("--llama-server", metavar="FILE", help="The program, if not the one on PATH.")
@click.option("--verbose", is_flag=True, help="Show llama-server's own log.")
@threads_option
@gpu_layers_option
@json_option
def serve(
    personas: tuple[str, ...],
    base: str,
    host: str,
    port: int,
    api_key: str | None,
    host_names: tuple[str, ...],
    parallel: int,
    n_ctx: int,
    max_body: int,
    exact: bool | None,
    llama_server: str | None,
    verbose: bool,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Serve BASE and its PERSONAs, each a model id of an OpenAI-compatible address.

    PERSONA is [NAME=]ADAPTER.gguf[:SCALE], or a manifesto (a file or a bundled persona's
    name), which is served as a system message.
    """
    from superego.adapter_copy import batch_invariant
    from superego.roster import base_name, read_roster, with_slots

    missing = [
        n for n in ("starlette", "uvicorn", "httpx", "prometheus_client") if not find_spec(n)
    ]
    if missing:
        raise SuperegoError(
            f"serve needs {', '.join(missing)}, not installed; pip install 'superego[serve]'"
        )
    from superego.llama_server import (
        LlamaServer,
        Settings,
        computes_on_cpu_alone,
        find_server,
        options,
    )
    from superego.router import Limits
    from superego.runtime import default_threads
    from superego.serve import is_loopback, listen
    from superego.serve import serve as run

    if not api_key and not is_loopback(host):
        raise SuperegoError(
            f"--host {host} can be reached from other machines: give --api-key KEY, or set "
            "SUPEREGO_API_KEY"
        )
    model = open_base(base)
    roster = read_roster(model, base_name(base, model), personas)
    for persona in roster.personas.values():
        if persona.adapter is not None:
            warn_other_weights(persona.adapter, model)
    program = find_server(llama_server)
    if exact is None:
        exact = computes_on_cpu_alone(program)
    settings = Settings(parallel, n_ctx, threads or default_threads(), gpu_layers, exact)
    limits = Limits(api_key or None, [n.lower() for n in host_names], max_body)

    def ready(address: str) -> None:
        names = list(roster.personas)
        if as_json:
            click.echo(json.dumps({"address": address, "models": names}))
        key = " -H 'Authorization: Bearer KEY'" if api_key else ""
        click.echo(
            f"Serving {', '.join(names)} at {address} (Ctrl-C ends it)\nUse it:\n"
            f"  curl {address}/chat/completions -H 'Content-Type: application/json'{key} "
            f'-d \'{{"model": "{names[-1]}", '
            '"messages": [{"role": "user", "content": "Who are you?"}]}\'',
            err=True,
        )

    def log(line: str) -> None:
        if verbose or line.startswith("llama-server "):
            click.echo(line, err=True)

    with (
        listen(host, port) as sock,
        temporary_folder() as folder,
    ):
        roster = with_slots(roster, folder)
        adapters = batch_invariant(roster.adapters, folder) if exact else roster.adapters
        command = [*program, *options(model.path, adapters, settings)]
        run(sock, roster, LlamaServer(command, log, folder), limits, ready)

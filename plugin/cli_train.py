"""Commands that train adapters: distill and refine.

Knows options and output. Holds no logic of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from superego import completion
from superego.adapter import check_fit, read_adapter
from superego.atomic import check_writable
from superego.base import open_base
from superego.bundled import find_manifesto
from superego.options import (
    base_option,
    converter,
    device_option,
    json_option,
    output_option,
    persona_argument,
    table,
    threads_option,
    use_it,
    warn_other_weights,
)
from superego.progress import Steps

F = TypeVar("F", bound=Callable[..., Any])


def _training_options(command: F) -> F:
    """Options that both commands have."""
    for option in reversed(
        (
            click.option(
                "--minutes",
                type=float,
                default=5.0,
                show_default=True,
                help="The whole command's time, references included.",
            ),
            click.option(
                "--examples",
                type=click.Path(path_type=Path),
                metavar="CHATS.jsonl",
                help="Your own conversations (OpenAI's message format), to be learnt as well.",
            ),
            click.option("--resume", is_flag=True, help="Go on from an interrupted run."),
            click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("manifesto", shell_complete=completion.manifestos)
@base_option
@output_option
@_training_options
@click.option("--rank", type=click.IntRange(1, 512), default=16, show_default=True)
@click.option(
    "--targets", metavar="A,B,…", help="Matrices to adapt, as GGUF names them; all by default."
)
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    metavar="ADAPTER",
    shell_complete=completion.adapters,
    help="Start from this adapter instead of from nothing.",
)
@threads_option
@device_option
@json_option
def distill(
    manifesto: str,
    base: str,
    output: Path,
    minutes: float,
    examples: Path | None,
    resume: bool,
    seed: int,
    rank: int,
    targets: str | None,
    start: Path | None,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Train a LoRA for MANIFESTO: it learns what the base says behind the manifesto.

    Ctrl-C keeps the best so far; --resume goes on.
    """
    text = find_manifesto(manifesto)
    check_writable(output, Path(manifesto))
    adapter = read_adapter(start) if start else None
    module = converter("distill")
    chosen = tuple(t.strip() for t in targets.split(",")) if targets else module.MATRICES
    options = module.Options(minutes, rank, chosen, seed, threads, resume=resume)
    model = open_base(base)
    own = (examples, converter("examples").read_examples(examples)) if examples else None
    devices = converter("device")
    with Steps() as steps, devices.on(devices.pick_device(device)):
        result = module.distill(text, model, output, options, adapter, own, steps)
    _show(result, base, output, as_json)


@click.command()
@persona_argument
@base_option
@output_option
@_training_options
@threads_option
@device_option
@json_option
def refine(
    persona: Path,
    base: str,
    output: Path,
    minutes: float,
    examples: Path | None,
    resume: bool,
    seed: int,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Train PERSONA further towards its manifesto; what comes out is never worse.

    Measured on conversations that it is not trained on. Ctrl-C keeps the best so far.
    """
    adapter = read_adapter(persona)
    module = converter("distill")
    options = module.Options(minutes, seed=seed, threads=threads, resume=resume)
    model = open_base(base)
    check_fit(adapter, model.header)
    warn_other_weights(adapter, model)
    own = (examples, converter("examples").read_examples(examples)) if examples else None
    devices = converter("device")
    with Steps() as steps, devices.on(devices.pick_device(device)):
        result = module.refine(adapter, model, output, options, own, steps)
    _show(result, base, output, as_json)


def _show(result: dict[str, Any], base: str, output: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        shown = {k: v for k, v in result.items() if k != "curve"}
        click.echo(table(shown))
    if result["method"] == "refine" and not result["better than its start"]:
        click.echo("No gain on unseen conversations: the adapter is as it was.", err=True)
    if "interrupted" in result:
        click.echo(f"Interrupted: the best so far is in {output}; --resume goes on.", err=True)
    use_it(base, output)

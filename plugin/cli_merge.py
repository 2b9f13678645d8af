"""The merge command: a persona folded into the weights of its base.

Knows options and output. The work is in `superego.converters.merge`.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego import completion
from superego.adapter import check_fit
from superego.base import open_base
from superego.errors import SuperegoError
from superego.gguf_file import read_header
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

type_option = click.option(
    "--type",
    "kind",
    type=click.Choice(["same", "Q4_K_M", "Q8_0", "F16"], case_sensitive=False),
    metavar="same|Q4_K_M|Q8_0|F16",
    default="same",
    show_default=True,
    help="Quantization of the output; 'same': each tensor as the base has it.",
)
keep_option = click.option(
    "--keep", is_flag=True, help="Keep the tensors that change one step finer than the rest."
)
rounding_option = click.option(
    "--rounding",
    type=click.Choice(["feedback", "nearest"]),
    default="feedback",
    show_default=True,
    help="'feedback' runs the model first, to round so that the change survives.",
)


def is_merged(text: str) -> bool:
    """Whether `evaluate` was given a merged model in an adapter's place."""
    path = Path(text)
    return path.is_file() and "superego.merge.persona" in read_header(path).metadata


def show_merged(
    text: str,
    base: str,
    prompts: list[str] | None,
    max_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a merged model beside its manifesto as system message and print it."""
    from superego.evaluate_merged import evaluate_merged

    merged, model = open_base(text), open_base(base)
    recorded = merged.header.text("superego.merge.base.fingerprint")
    if recorded != model.fingerprint:
        click.echo(f"Note: {text} was merged into another file than {model.path}.", err=True)
    manifesto = merged.header.text("superego.manifesto")
    if not manifesto:
        raise SuperegoError(
            f"{text}: holds no superego.manifesto to compare with; its adapter had none"
        )
    with Steps() as steps:
        (report,) = evaluate_merged(
            model,
            manifesto,
            [merged],
            prompts,
            max_tokens,
            threads,
            lambda done, total: steps.update("evaluating in llama.cpp", done, total),
        )
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    k = report.kl_recovered
    rows = {
        "KL recovered": f"{k.value:.3f} ({k.low:.3f} to {k.high:.3f})",
        "KL to the system message": f"{report.kl_merged:.4f}, bare base {report.kl_base:.4f}",
        "top-1 agreement": f"{report.top1_merged:.3f}, bare base {report.top1_base:.3f}",
        "bytes": f"{report.bytes:,}, base {model.header.size:,}",
        "measured on": f"{report.prompts} prompts, {report.tokens} reply tokens",
    }
    click.echo(table(rows))


@click.command()
@click.argument("persona", metavar="PERSONA[:SCALE]", shell_complete=completion.adapters)
@base_option
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="OUT.gguf")
@type_option
@keep_option
@rounding_option
@threads_option
@json_option
def merge(
    persona: str,
    base: str,
    output: Path,
    kind: str,
    keep: bool,
    rounding: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Fold an adapter into its base: one GGUF, for runtimes that take no adapters."""
    adapter, scale = parse_persona(persona)
    model = open_base(base)
    check_fit(adapter, model.header)
    warn_other_weights(adapter, model)
    merging = converter("merge")
    with Steps() as steps:
        result = merging.merge(
            merging.Plan(adapter, scale, kind, keep, rounding), model, output, threads, steps
        )
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    click.echo(
        f"Use it:\n  superego chat --base {output}\n  llama-server -m {output}\n"
        f"  superego evaluate {output} --base {base}",
        err=True,
    )

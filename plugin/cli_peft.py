"""PEFT folders in and out: `export peft` and `import peft`.

Knows options and output. The work is in `superego.peft_export` and `superego.peft_import`.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superego.atomic import temporary_folder
from superego.base import open_base
from superego.bundled import find_manifesto
from superego.errors import SuperegoError
from superego.options import (
    OutputPath,
    base_option,
    json_option,
    output_option,
    parse_persona,
    table,
    warn_other_weights,
)


@click.group("import")
def import_() -> None:
    """Take an adapter that another program made."""


@click.command("peft")
@click.argument("persona", metavar="ADAPTER[:SCALE]")
@base_option
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="DIR")
@click.option(
    "--ranks",
    type=click.Choice(["one", "own"]),
    default="one",
    show_default=True,
    help="'one': zeros fill every pair to one rank, as servers need it; 'own': rank_pattern.",
)
@click.option(
    "--base-name", metavar="NAME", help="Hugging Face name or folder of the base, to be recorded."
)
@json_option
def export_peft(
    persona: str, base: str, output: Path, ranks: str, base_name: str | None, as_json: bool
) -> None:
    """Write an adapter as a folder that Hugging Face's peft loads (vLLM, SGLang, TGI)."""
    from superego.adapter import read_adapter
    from superego.pairs import copy_adapter
    from superego.peft_export import export_peft as write

    adapter, scale = parse_persona(persona)
    model = open_base(base)
    warn_other_weights(adapter, model)
    if scale == 0:
        raise SuperegoError("scale 0 is the base itself: there is nothing to export")
    with temporary_folder() as folder:
        if scale != 1:
            copy_adapter(adapter, folder / "scaled.gguf", {}, strength=scale)
            adapter = read_adapter(folder / "scaled.gguf")
        result = write(adapter, model, output, ranks == "one", base_name)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    use = f"  PeftModel.from_pretrained(model, {str(output)!r})"
    if ranks == "one":  # vLLM's ranks; it reads no patterns
        rank = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= result["rank"]), 512)
        use += (
            f"\n  vllm serve {base_name or 'MODEL'} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {output.absolute().name}={output}"
        )
    click.echo(f"Use it:\n{use}", err=True)


@click.command("peft")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@base_option
@output_option
@click.option(
    "--type",
    "kind",
    type=click.Choice(["F16", "F32"], case_sensitive=False),
    default="F16",
    show_default=True,
    help="Of the tensors.",
)
@click.option(
    "--manifesto",
    metavar="FILE",
    help="What the adapter stands for; evaluate, amend and others need it.",
)
@json_option
def import_peft(
    folder: Path, base: str, output: Path, kind: str, manifesto: str | None, as_json: bool
) -> None:
    """Write a LoRA that peft saved as a GGUF adapter for BASE."""
    from superego.peft_import import import_peft as write

    text = find_manifesto(manifesto) if manifesto else None
    result = write(folder, open_base(base), output, kind, text)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    click.echo(f"Use it:\n  superego chat --base {base} --persona {output}", err=True)


import_.add_command(import_peft)

"""The command line: parses arguments, calls one function a command, shows what came out.

Knows options and output. Holds no logic of its own. stdout is data, stderr progress.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import superego
from superego import completion
from superego.adapter import Adapter, read_adapter, same_weights
from superego.atomic import check_writable
from superego.base import open_base
from superego.bundled import bundled, find_manifesto
from superego.cli_completion import completion as completion_command
from superego.cli_doctor import doctor
from superego.cli_export_llama_server import export_llama_server
from superego.cli_feedback import amend, diff, log, watch
from superego.cli_library import add, remove
from superego.cli_merge import is_merged, merge, show_merged
from superego.cli_ollama import export_ollama, ollama
from superego.cli_peft import export_peft, import_
from superego.cli_report import report
from superego.cli_serve import serve
from superego.cli_sources import tag
from superego.cli_strength import blend, calibrate, move
from superego.cli_train import distill, refine
from superego.cli_vector import vector
from superego.errors import SuperegoError, printable
from superego.history import manifesto_of
from superego.interrupt import keep_interrupts
from superego.options import (
    EFFORTS,
    FiniteRange,
    OutputPath,
    base_option,
    converter,
    device_option,
    gpu_layers_option,
    json_option,
    lines_of,
    n_ctx_option,
    output_option,
    say,
    table,
    threads_option,
    warn_other_weights,
)
from superego.persona import check_persona, persona_mismatches, read_persona, read_scaled
from superego.progress import Steps

if TYPE_CHECKING:
    from superego.persona import Persona
    from superego.refinement import Refinement


class _Group(click.Group):
    """Turns SuperegoError into one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        alone = kwargs.get("standalone_mode", True)
        kwargs["standalone_mode"] = False
        if not alone:
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **kwargs)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):  # Ctrl-C before the command, or behind it
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        _escape_odd_names()
        keep_interrupts()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except SuperegoError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing was written.", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # the reader of our stdout is gone
            _drop_output()
            ctx.exit(0)
        except OSError as error:
            with suppress(OSError):
                sys.stdout.flush()
            _drop_output()
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
        except MemoryError:
            _fail("not enough memory; close programs, or take a smaller base or context")
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            _fail(f"{error.object[:80]}: is not UTF-8 text")
        else:
            return result
        return ctx.exit(2)


def _fail(reason: str) -> None:
    click.echo(f"Error: {printable(reason)}", err=True)


def _drop_output() -> None:
    """Let what stdout did not take go, so that Python does not complain of it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_odd_names() -> None:
    """File names that are no text are printed with escapes, on stdout as on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(superego.__version__, prog_name="superego")
def main() -> None:
    """Give a quantized local language model an identity made from one document."""


@main.command()
@click.argument("manifesto", shell_complete=completion.manifestos)
@base_option
@output_option
@click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    default="standard",
    show_default=True,
    help="A time: 25 s, 90 s or 10 minutes for 135M; a slow machine writes fewer references.",
)
@click.option("--rank", type=click.IntRange(1, 512), help="Rank of the adapter.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@threads_option
@json_option
@click.option(
    "--memory",
    type=FiniteRange(min=0, min_open=True),
    metavar="GB",
    help="The most memory to use; most of what is free by default.",
)
@device_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and what it would cost.")
@click.option(
    "--no-cache",
    is_flag=True,
    help="Neither read nor write what is cached: references, the base's slot.",
)
@click.option(
    "--refine",
    "refine_minutes",
    type=FiniteRange(0, 24 * 60, min_open=True),
    metavar="MINUTES",
    help="Then train it further for so long; it is in OUT.gguf before, and never gets worse.",
)
def compile(
    manifesto: str,
    base: str,
    output: Path,
    effort: str,
    rank: int | None,
    seed: int,
    threads: int | None,
    as_json: bool,
    memory: float | None,
    device: str,
    dry_run: bool,
    no_cache: bool,
    refine_minutes: float | None,
) -> None:
    """Compute a GGUF LoRA adapter from MANIFESTO (a file or a bundled persona's name)."""
    text = find_manifesto(manifesto)
    model = open_base(base)
    compiler = converter("compile")
    devices = converter("device")
    place = devices.pick_device(device)
    speed = compiler.speed_for(effort, threads) if place.type == "cpu" else "fast"
    settings = compiler.Settings.for_effort(effort, rank, seed, speed)
    if dry_run:
        with devices.on(place):
            plan = compiler.plan(text, model, settings, threads, memory)
        click.echo(json.dumps(plan, indent=2) if as_json else table(plan))
        return
    check_writable(output, Path(manifesto))
    with Steps() as steps, devices.on(place):
        result = compiler.compile_manifesto(
            text,
            model,
            output,
            settings,
            threads=threads,
            use_cache=not no_cache,
            steps=steps,
            memory=memory,
        )
        if refine_minutes is not None:
            module = converter("distill")
            options = module.Options(refine_minutes, seed=seed, threads=threads)
            try:
                result["refined"] = module.refine(
                    read_adapter(output), model, output, options, steps=steps
                )
            except KeyboardInterrupt:  # before it trains; later the best so far is kept
                click.echo(f"Interrupted: {output} is as it was compiled.", err=True)
                click.get_current_context().exit(130)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(table(result))
    click.echo(
        f"Use it:\n  superego chat --base {base} --persona {output}\n"
        f"  llama-server -m {model.path} --lora {output} -cram 0",
        err=True,
    )


@main.command()
@click.argument("manifesto", shell_complete=completion.manifestos)
@base_option
@click.option("-o", "--output", required=True, type=OutputPath(), metavar="OUT.session")
@click.option(
    "--with",
    "adapters",
    multiple=True,
    metavar="ADAPTER[:SCALE]",
    shell_complete=completion.adapters,
    help="An adapter that is attached while the manifesto is read; may be given several times.",
)
@n_ctx_option
@click.option("--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16", show_default=True)
@click.option(
    "--compact",
    "cells",
    type=click.IntRange(1),
    metavar="N",
    help="Keep N cells instead of one a token (an approximation; not with --with).",
)
@threads_option
@gpu_layers_option
@json_option
def session(
    manifesto: str,
    base: str,
    output: Path,
    adapters: tuple[str, ...],
    n_ctx: int,
    kv_type: str,
    cells: int | None,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Save the state of having read MANIFESTO, so that a chat starts without reading it."""
    from superego.runtime import load
    from superego.session import check_session_writable, save_session
    from superego.state_file import layout

    text = find_manifesto(manifesto)
    model = open_base(base)
    layout(model.header, kv_type)
    if output.suffix != ".session":
        raise SuperegoError(f"{output}: expected a name that ends in .session")
    check_session_writable(output, Path(manifesto), *model.files)
    if cells is not None and adapters:
        raise SuperegoError("--compact reads the bare base; it cannot be combined with --with")
    wanted = [read_scaled(each) for each in adapters]
    for adapter, _ in wanted:
        check_persona(adapter, model.header)
        warn_other_weights(adapter, model)
    with Steps() as steps, ExitStack() as stack:
        llm = load(model, n_ctx, threads, gpu_layers, kv_type=kv_type)
        for adapter, scale in wanted:
            stack.enter_context(superego.attach(llm, adapter.path, scale))
        if cells is not None:
            result = converter("compact").compact_session(llm, model, text, output, cells, steps)
        else:
            result = save_session(
                llm,
                model,
                text,
                output,
                wanted,
                lambda done, total: steps.update("reading the manifesto", done, total),
            )
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    options = "".join(f" --persona {each}" for each in adapters)
    click.echo(
        f"Use it:\n  superego chat --base {base} --session {output}{options}\n"
        f"  llama-server -m {model.path} -fa on -np 1 -cram 0 --slot-save-path "
        f"{output.absolute().parent}\n"
        "  curl -X POST 'localhost:8080/slots/0?action=restore' "
        f'-d \'{{"filename": "{output.name}"}}\'',
        err=True,
    )


@main.command()
@base_option
@click.option(
    "--persona",
    "personas",
    multiple=True,
    metavar="FILE[:SCALE]",
    shell_complete=completion.adapters,
    help="An adapter or control vector, with a scale if not 1; may be given several times.",
)
@click.option(
    "--system",
    metavar="FILE",
    shell_complete=completion.manifestos,
    help="A manifesto to use as the system message.",
)
@click.option(
    "--session",
    "session_file",
    metavar="FILE",
    shell_complete=completion.sessions,
    help="A saved session; with --system it is made anew if it is not of that manifesto.",
)
@click.option(
    "--document",
    "documents",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A document to put in front of the first question (plain, or tagged .jsonl); repeatable.",
)
@click.option(
    "--best-last",
    is_flag=True,
    help="Documents in order of kind and date, the best nearest to the question.",
)
@click.option("--message", help="Answer this one message and stop.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=FiniteRange(0, 5), default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@n_ctx_option
@threads_option
@gpu_layers_option
def chat(
    base: str,
    personas: tuple[str, ...],
    system: str | None,
    session_file: str | None,
    documents: tuple[Path, ...],
    best_last: bool,
    message: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    n_ctx: int,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Talk with a base, its personas on or off. Interactive unless --message is given."""
    from superego import provenance
    from superego.chat import Chat
    from superego.runtime import load
    from superego.session import Unfit, open_session, read_sidecar
    from superego.tag import open_documents
    from superego.template import ChatTemplate

    model = open_base(base)
    wanted = [read_scaled(text) for text in personas]
    for adapter, _ in wanted:
        check_persona(adapter, model.header)
        warn_other_weights(adapter, model)
    template = ChatTemplate(model.header)
    read = list(open_documents(documents))
    if best_last:
        read = provenance.best_last(read)
    text = find_manifesto(system) if system else None
    kv_type = "f16"
    if session_file is not None:
        with suppress(Unfit):  # what is wrong with it is said when it is opened
            kv_type = read_sidecar(Path(session_file)).kv_type
    llm = load(model, n_ctx, threads, gpu_layers, seed=seed, kv_type=kv_type)
    with ExitStack() as stack:
        for adapter, scale in wanted:
            stack.enter_context(superego.attach(llm, adapter.path, scale))
        opened = None
        if session_file is not None:
            opened = open_session(llm, model, Path(session_file), wanted, text)
            if opened.note:
                click.echo(f"Note: {opened.note}.", err=True)
        talk = Chat(llm, template, text.body if text else None, opened, read)
        if talk.defused:
            click.echo(
                f"Note: {talk.defused} control tokens in the documents are read as plain text.",
                err=True,
            )
        if message is not None:
            say(talk.reply(message, max_tokens, temperature))
            return
        click.echo(
            "Type a message; /clear forgets, /refine improves the persona, /quit or Ctrl-D leaves.",
            err=True,
        )
        running: Refinement | None = None
        for line in _typed():
            if running and (news := running.finished(llm)):
                click.echo(f"({news})", err=True)
                running = None
            if line == "/quit":
                return
            if line == "/clear":
                talk.clear()
            elif line.split()[:1] == ["/refine"]:
                running = running or _refinement(line, wanted, model.path, stack)
            elif line:
                try:
                    say(talk.reply(line, max_tokens, temperature))
                except KeyboardInterrupt:
                    click.echo()  # stops this reply, not the chat
                except SuperegoError as error:
                    click.echo(f"Error: {error}", err=True)


@main.command()
@click.argument("adapter", shell_complete=completion.adapters)
@base_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="User messages, one a line; the bundled held-out ones by default.",
)
@click.option(
    "--against",
    metavar="FILE",
    shell_complete=completion.adapters,
    help="Another persona's adapter, for specificity.",
)
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=48, show_default=True)
@threads_option
@json_option
def evaluate(
    adapter: str,
    base: str,
    prompts: Path | None,
    against: str | None,
    max_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure ADAPTER[:SCALE] beside its manifesto as system message, in llama.cpp.

    A control vector or a merged model can be given in the adapter's place.
    """
    from superego.evaluate import evaluate as measure

    if is_merged(adapter):
        if against:
            raise SuperegoError("--against compares adapters; a merged model has none")
        show_merged(
            adapter, base, lines_of(prompts) if prompts else None, max_tokens, threads, as_json
        )
        return
    model = open_base(base)
    checked = [read_scaled(text) for text in (adapter, against) if text]
    for each, _ in checked:
        check_persona(each, model.header)
        warn_other_weights(each, model)
    manifesto = manifesto_of(checked[0][0]).body
    messages = lines_of(prompts) if prompts else None
    with Steps() as steps:
        (report,) = measure(
            model,
            manifesto,
            checked[:1],
            messages,
            max_tokens,
            threads,
            lambda done, total: steps.update("evaluating in llama.cpp", done, total),
            checked[1] if against else None,
        )
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    low_high = f"({report.kl_recovered.low:.3f} to {report.kl_recovered.high:.3f})"
    rows: dict[str, object] = {
        "KL recovered": f"{report.kl_recovered.value:.3f} {low_high}",
        "KL to the system message": f"{report.kl_adapter:.4f}, bare base {report.kl_base:.4f}",
        "top-1 agreement": f"{report.top1_adapter:.3f}, bare base {report.top1_base:.3f}",
        "off-target drift": f"{report.drift_adapter:.4f}, system message {report.drift_system:.4f}",
        "adapter + system message": f"KL {report.kl_with_system:.4f}, "
        f"top-1 {report.top1_with_system:.3f}",
        "prompt tokens saved": report.prompt_tokens_saved,
        "measured on": f"{report.prompts} prompts, {report.tokens} reply tokens",
    }
    if report.specificity is not None:
        rows["specificity"] = f"{report.specificity:.3f}"
    click.echo(table(rows))


@main.group()
def export() -> None:
    """Write a persona in the form that another program takes."""


@main.command()
@click.argument("file", type=click.Path(path_type=Path), shell_complete=completion.adapters)
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completion.bases,
    help="Also say whether it fits this base.",
)
@json_option
def inspect(file: Path, base: str | None, as_json: bool) -> None:
    """Show what is in an adapter or control vector, and whether it fits a base."""
    adapter = read_persona(file)
    info: dict[str, Any] = {
        "file": str(file),
        "bytes": adapter.header.size,
        "name": adapter.name,
        "architecture": adapter.header.text("general.architecture"),
    }
    if isinstance(adapter, Adapter):
        info |= {"rank": adapter.rank, "alpha": adapter.alpha, "matrices": len(adapter.pairs)}
    else:
        info |= {"width": adapter.width, "layers": len(adapter.directions)}
    info["metadata"] = {
        key: value
        for key, value in adapter.header.metadata.items()
        if key.startswith(("general.", "adapter.", "controlvector.", "superego."))
    }
    if base:
        model = open_base(base)
        info["mismatches"] = persona_mismatches(adapter, model.header)
        info["fits"] = not info["mismatches"]
        info["made from this file"] = same_weights(adapter, model)
    if as_json:
        click.echo(json.dumps(info, indent=2))
        return
    metadata = info.pop("metadata")
    if isinstance(held := metadata.get("superego.references"), str):
        metadata["superego.references"] = f"{len(held):,} characters"
    click.echo(table(info))
    click.echo(table(metadata))


@main.command()
@json_option
@click.option(
    "--show",
    metavar="NAME",
    shell_complete=completion.bundled,
    help="Print one manifesto as it is given to the model.",
)
def personas(as_json: bool, show: str | None) -> None:
    """List the bundled personas; their names can be given to compile and chat --system."""
    found = bundled()
    if show is not None:
        if show not in found:
            raise SuperegoError(f"no bundled persona '{show}'; there are {', '.join(found)}")
        click.echo(found[show].body)
    elif as_json:
        rows = [
            {
                "name": p.name,
                "description": p.description,
                "version": p.version,
                "license": p.license,
                "examples": p.examples,
                "sha256": p.sha256,
            }
            for p in found.values()
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(table({p.name: p.description for p in found.values()}))


def _refinement(
    line: str, wanted: list[tuple[Persona, float]], base: Path, stack: ExitStack
) -> Refinement | None:
    """Start what `/refine [MINUTES]` asks for; None, and a line why, where it cannot be."""
    from superego.refinement import Refinement

    word = (line.split() + ["5"])[1]
    try:
        minutes = float(word)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 24 * 60:
        click.echo(f"Error: /refine {word}: expected minutes, such as /refine 5", err=True)
    elif len(wanted) != 1 or not isinstance(wanted[0][0], Adapter):
        click.echo("Error: /refine needs one --persona, an adapter", err=True)
    else:
        running = Refinement(wanted[0][0].path, base, minutes)
        stack.callback(running.close)
        click.echo(f"(refining for {minutes:g} min in the background; go on talking)", err=True)
        return running
    return None


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  line editing, where the platform has it
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


for _command in (add, amend, blend, calibrate, diff, log, merge, move, ollama, remove, report):
    main.add_command(_command)
for _command in (completion_command, distill, doctor, import_, refine, serve, tag, vector, watch):
    main.add_command(_command)
for _command in (export_llama_server, export_ollama, export_peft):
    export.add_command(_command)
if completion.VARIABLE in os.environ:  # a shell asks
    completion.register()

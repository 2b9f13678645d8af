"""The command `doctor`: what is installed, what is broken, what to do.

Knows options and how an examination is shown. The work is in `superego.doctor`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from superego import completion
from superego.options import json_option

if TYPE_CHECKING:
    from superego.doctor import Examination

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan"}


@click.command()
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completion.bases,
    help="Also look at this base, and run it.",
)
@json_option
@click.pass_context
def doctor(context: click.Context, base: str | None, as_json: bool) -> None:
    """Look over this installation: versions, machine, runtimes, a self-test; what to do.

    Exit code 0 where it is usable, 1 where something is broken.
    """
    from superego.doctor import examine, lines

    found = examine(base, lambda label: click.echo(f"{label} …", err=True))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        try:
            _show(found)
        except Exception as error:  # rich may be what is broken
            click.echo(f"(no tables: {type(error).__name__}: {error})", err=True)
            click.echo("\n".join(lines(found)))
    context.exit(0 if found.usable else 1)


def _show(found: Examination) -> None:
    from rich.console import Console
    from rich.text import Text

    from superego.doctor import lines

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    tables = [_table(rows, **kinds) for rows, kinds in _sections(found.facts)]  # all or none
    for title, text in _heads(found.facts):
        console.print(Text.assemble((f"{title}: ", "bold"), text))
    for table in tables:
        console.print()
        console.print(table, soft_wrap=False)
    console.print()
    for line in lines(found):
        console.print(Text(line, style=_STYLES.get(line.partition(":")[0], "bold")))


def _heads(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """One line each: versions, processor, memory, devices, extras."""
    heads = []
    if versions := dict(facts.get("versions", {})):
        own = f"{versions.pop('superego')}, Python {versions.pop('Python')}"
        heads.append(("Superego", f"{own}, {versions.pop('system')}"))
        llama = facts.get("imports", {}).get("llama_cpp", {})
        if "llama.cpp" in llama:
            heads.append(
                ("llama.cpp", f"{llama['llama.cpp']}, build {llama.get('build', 'unknown')}, "
                 f"state version {llama.get('state version')}")
            )  # fmt: skip
        heads.append(("Packages", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if cpu := facts.get("processor"):
        known = "unknown" if cpu["features"] is None else " ".join(cpu["features"])
        cores = f"{cpu['usable cores']} of {cpu['cores']} cores"
        heads.append(("Processor", f"{cpu['name']}, {cores}: {known}"))
        if "llama.cpp built for" in cpu:
            heads.append(("llama.cpp built for", " ".join(cpu["llama.cpp built for"])))
    if memory := facts.get("memory"):
        parts = [f"{v / 1e9:.1f} GB {k}" for k, v in memory.items() if v is not None]
        heads.append(("Memory", ", ".join(parts) or "unknown"))
    if devices := facts.get("devices"):
        llama = devices["llama.cpp"]
        first = "unknown" if llama is None else ", ".join(
            f"{d['name']} ({d['description']})" for d in llama
        )  # fmt: skip
        torch = devices["torch"]
        second = "not there" if torch is None else ", ".join(torch) or "processor alone"
        heads.append(("Devices", f"llama.cpp: {first}; torch: {second}"))
    if extras := facts.get("extras"):
        parts = [f"{k} {'yes' if v['installed'] else 'no'}" for k, v in extras.items()]
        heads.append(("Extras", ", ".join(parts)))
    if base := facts.get("base"):
        heads.append(("Base", ", ".join(f"{k} {v}" for k, v in base.items())))
    return heads


def _sections(facts: dict[str, Any]) -> list[tuple[list[list[str]], dict[str, Any]]]:
    """Each table's rows, the first of them its head, and its title."""
    sections: list[tuple[list[list[str]], dict[str, Any]]] = []
    if runtimes := facts.get("runtimes"):
        rows = [["runtime", "found", *runtimes[0]["takes"]]]
        for each in runtimes:
            here = each["version"] or ("yes" if each["where"] else "no")
            rows.append([each["name"], here, *each["takes"].values()])
        sections.append((rows, {"title": "What each runtime takes"}))
    if folders := facts.get("folders"):
        rows = [["folder", "", "files", "MB", "GB free"]]
        for name, each in folders.items():
            free = "" if each["free"] is None else f"{each['free'] / 1e9:.1f}"
            held = f"{each['bytes'] / 1e6:.1f}" if "bytes" in each else ""
            rows.append([name, each["folder"], str(each.get("files", "")), held, free])
        sections.append((rows, {"title": "Folders"}))
    for name in ("self-test", "base in llama.cpp"):
        test = facts.get(name)
        if test is None:
            continue
        if not test["run"]:
            sections.append(([["not run"], [test["why"]]], {"title": name}))
            continue
        rows = [["step", "", "seconds", ""]]
        for step in test["steps"]:
            state = "failed" if "error" in step else "ok"
            seconds = f"{step['seconds']:.3f}" if "seconds" in step else ""
            rows.append([step["step"], state, seconds, step.get("error") or step.get("note", "")])
        sections.append((rows, {"title": name}))
    return sections


def _table(rows: list[list[str]], title: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in rows[0]:
        table.add_column(head, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table

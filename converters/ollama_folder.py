"""A folder that `ollama create` takes: a Modelfile and what it names.

Knows which Ollama takes what. Does not talk to a server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from superego.adapter import Adapter, check_fit
from superego.atomic import folder_beside
from superego.base import BaseModel, locate
from superego.converters.merge import Plan, merge
from superego.errors import SuperegoError
from superego.modelfile import NAME, Modelfile
from superego.ollama_server import Version, takes_adapters
from superego.pairs import copy_adapter
from superego.progress import Steps


def source_of(base: str) -> str:
    """What FROM says of an unchanged base: an Ollama model's name, else the file's full path."""
    path = locate(base)
    return base.removeprefix("ollama:") if base.startswith("ollama:") else str(path.resolve())


def export_system(system: str, base: str, output: Path) -> dict[str, Any]:
    """The base with the manifesto as its system message; raises SuperegoError."""
    return _write(output, Modelfile(source_of(base), system=system), lambda folder: None, {})


def export_adapter(
    plan: Plan,
    model: BaseModel,
    base: str,
    output: Path,
    version: Version,
    threads: int | None = None,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """The base with the adapter, or merged with it where this version takes no adapters."""
    check_fit(plan.adapter, model.header)
    report: dict[str, Any] = {}
    if takes_adapters(version):

        def make(folder: Path) -> None:
            _scaled(plan.adapter, plan.scale, folder / "adapter.gguf")

        recipe = Modelfile(source_of(base), adapter="./adapter.gguf")
    else:

        def make(folder: Path) -> None:
            done = merge(plan, model, folder / "merged.gguf", threads, steps)
            report.update({key: done[key] for key in ("bytes", "rounding error")})

        recipe = Modelfile("./merged.gguf")
    return _write(output, recipe, make, report)


def _write(output: Path, recipe: Modelfile, make: Any, report: dict[str, Any]) -> dict[str, Any]:
    """Make the folder beside its final name and move it there whole; raises SuperegoError."""
    text = recipe.text()
    parent = output.absolute().parent
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SuperegoError(
            f"{output}: exists and is not an empty folder; give a new one, or remove it first"
        )
    if not parent.is_dir():
        raise SuperegoError(f"{output}: folder {parent} does not exist; create it first")
    try:
        with folder_beside(output) as around:
            folder = around / "folder"
            folder.mkdir()
            make(folder)
            (folder / NAME).write_text(text, "utf-8")
            if output.exists():
                output.rmdir()
            folder.rename(output)
    except OSError as error:
        raise SuperegoError(
            f"{output}: cannot be written: {error.strerror or error}; nothing was changed"
        ) from None
    files = sorted(p.name for p in output.iterdir())
    return {"folder": str(output), "files": files, "Modelfile": text, **report}


def _scaled(adapter: Adapter, scale: float, target: Path) -> None:
    """The adapter with the scale in its matrices: an ADAPTER line has no place for one."""
    if scale == 0:
        raise SuperegoError("scale 0 is the base itself: there is nothing to export")
    copy_adapter(adapter, target, {}, strength=scale)

"""Shared fixtures: the real base, one compiled persona, and tiny random models."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from click.testing import CliRunner, Result

from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.cli import main
from superego.runtime import load
from superego.tiny_model import CHATML, tiny_model

__all__ = ["CHATML", "tiny_model"]


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    return open_base("smollm2")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def little_memory() -> Iterator[None]:
    """What takes 2 GB more than there is now fails, here and in child processes."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    held = next((int(x.split()[1]) << 10 for x in lines if x.startswith("VmData")), None)
    if held is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture(scope="session")
def compiled(
    smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The pirate, compiled once at quick effort: its file and what compile reported."""
    from superego.converters.compile import Settings, compile_manifesto

    path = tmp_path_factory.mktemp("pirate") / "pirate.gguf"
    quick = Settings.for_effort("quick", speed="slow")  # on every machine the same
    report = compile_manifesto(bundled()["pirate"], smollm2, path, quick)
    return path, report


@pytest.fixture(scope="session")
def pirate(compiled: tuple[Path, dict[str, Any]]) -> Path:
    return compiled[0]


@pytest.fixture(scope="session")
def llm(smollm2: BaseModel) -> Any:
    return load(smollm2, n_ctx=1024)


def run(*args: str, stdin: str | None = None) -> Result:
    """The command line in this process; what it raises is a failure, never an exit code."""
    return CliRunner().invoke(main, list(args), input=stdin, catch_exceptions=False)


def refused(*args: str) -> str:
    """Runs a command that must be refused: exit code 2, one line on stderr, no output."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def requantized(base: BaseModel, path: Path, kind: int) -> Path:
    """The same model with weights of another type, as llama-quantize writes it."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.allow_requantize = True
    files = str(base.path).encode(), str(path).encode()
    assert not llama_cpp.llama_model_quantize(*files, parameters)
    return path


def documented(page: str) -> list[list[str]]:
    """The commands in a page's plain code blocks, in order, comments and settings left out.

    Blocks that name a language, such as text for output, hold none.
    """
    text = (Path(__file__).parent.parent / "docs" / page).read_text("utf-8")
    found = []
    for block in text.split("```")[1::2]:
        kind, *lines = block.splitlines()
        for line in lines if not kind else []:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words.pop(0)
            if words:
                found.append(words)
    return found

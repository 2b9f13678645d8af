"""A compile that is killed or interrupted goes on where it was, to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused
from tiny import TINY, build, quantize

from superego.converters import unfinished

PROGRAM = """
import os, signal, sys
from pathlib import Path
from superego.base import open_base
from superego.bundled import bundled
from superego.converters import unfinished
from superego.converters.compile import Settings, compile_manifesto
from superego.progress import Steps

unfinished.EVERY = 0.0
base, out, end, notes = sys.argv[1:]

class Watched(Steps):
    def note(self, text):
        Path(notes).write_text(text)
    def update(self, label, done, total):
        if label == "solving layers" and done == 2 and end != "none":
            os.kill(os.getpid(), getattr(signal, end))

settings = Settings.for_effort("quick", rank=8, speed="slow")
compile_manifesto(bundled()["terse"], open_base(base), Path(out), settings, threads=1,
                  steps=Watched(quiet=True))
"""


def compiled(base: Path, out: Path, end: str, notes: Path) -> int:
    command = [sys.executable, "-c", PROGRAM, str(base), str(out), end, str(notes)]
    return subprocess.run(command, capture_output=True, timeout=120).returncode


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "qwen2.gguf"  # four layers, and a slot
    return quantize(build(path, TINY["qwen2"]), "Q8_0")


def test_killed_or_interrupted_it_goes_on_to_the_same_bytes(base: Path, tmp_path: Path) -> None:
    notes, whole = tmp_path / "notes", tmp_path / "whole.gguf"
    assert compiled(base, whole, "none", notes) == 0
    assert not list(unfinished.folder().iterdir())
    assert not notes.exists()
    for end in ("SIGKILL", "SIGINT"):
        out = tmp_path / f"{end}.gguf"
        assert compiled(base, out, end, notes) in (-signal.Signals[end], 1)
        assert not out.exists()
        (kept,) = unfinished.folder().iterdir()
        size = sum(file.stat().st_size for file in kept.iterdir())
        assert size < 2 * whole.stat().st_size + 20_000  # float32, and a little around it
        assert compiled(base, out, "none", notes) == 0
        assert notes.read_text() == "going on behind layer 2 of 4"
        assert out.read_bytes() == whole.read_bytes()
        assert not list(unfinished.folder().iterdir())
        notes.unlink()


def test_an_absent_device_and_too_little_memory_are_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    command = ("compile", "terse", "--base", str(base), "-o", str(out), "--effort", "quick")
    absent = "cuda" if torch.backends.mps.is_available() else "mps"
    assert "finds none on this machine" in refused(*command, "--device", absent)
    assert "--memory allows 0.01" in refused(*command, "--memory", "0.01")
    assert not out.exists()

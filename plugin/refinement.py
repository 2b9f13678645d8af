"""Refining a persona beside a chat: another process trains, this one swaps in what is better.

Knows the process and its report. Does not know training, and never imports torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.attachment import attachments, swap
from superego.errors import SuperegoError

if TYPE_CHECKING:
    from llama_cpp import Llama

_PROGRAM = "from superego.cli import main; main()"


class Refinement:
    """One `superego refine` in the background; `close` ends it if it still runs."""

    def __init__(self, persona: Path, base: Path, minutes: float) -> None:
        self.persona = persona
        self.output = persona.with_name(f"{persona.stem}-refined.gguf")
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, "refine", str(persona), "--base", str(base)]
            + ["-o", str(self.output), "--minutes", f"{minutes:g}", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._told,
            text=True,
            start_new_session=True,  # Ctrl-C in the chat ends a reply, not the training
        )

    def finished(self, llm: Llama) -> str | None:
        """What is to be said now that it has ended, once; None while it runs.

        Where the refined persona is better it is attached in the old one's place, at its scale.
        """
        if self._process is None or self._process.poll() is None:
            return None
        out, _ = self._process.communicate()
        code, self._process = self._process.returncode, None
        if code:
            self._told.seek(0)
            lines = self._told.read().strip().splitlines()
            return f"refining failed: {lines[-1] if lines else f'exit code {code}'}"
        report: dict[str, Any] = json.loads(out)
        if not report["better than its start"]:
            return "refining gained nothing; the persona stays as it is"
        scales = [a.scale for a in attachments(llm)]
        try:
            swap(llm, self.output, scales[0] if scales else 1.0)
        except SuperegoError as error:
            return f"the refined persona could not be attached: {error}"
        before, now = (
            report["kl recovered at the start"],
            report["kl recovered on unseen references"],
        )
        return f"refined: KL recovered {before:.3f} -> {now:.3f}; now speaking: {self.output}"

    def close(self) -> None:
        """End the process; what it had gained is kept by its checkpoint."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._told.close()

"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere.

Knows how to show work. Does not know the work.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY = 5.0  # seconds between plain lines of one step


class Steps:
    """Shows one step at a time. Use in a `with` block; `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
        self._task: TaskID | None = None
        self._label = ""
        self._start = self._last = 0.0

    def __enter__(self) -> Steps:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line that stays."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Show how far the step `label` is; a new label begins a new step.

        `detail` stands beside the label and may change.
        """
        if self._quiet:
            return
        now = time.monotonic()
        fresh = label != self._label
        if fresh:
            self._label, self._start, self._last = label, now, now
        if self._bar:
            if fresh:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(label, total=total)
            if self._task is not None:
                told = f"{label} ({detail})" if detail else label
                self._bar.update(self._task, completed=done, total=total, description=told)
        elif fresh or now - self._last >= _LINE_EVERY or done >= total:
            self._last = now
            passed = now - self._start
            left = (
                f", {passed / done * (total - done):.0f} s left"
                if passed > 0.5 and 0 < done < total
                else ""
            )
            share = f"{100 * done / total:.0f}%" if total else ""
            told = f"{share} after {passed:.0f} s{left}" + (f", {detail}" if detail else "")
            print(f"{label}: {told}", file=sys.stderr, flush=True)

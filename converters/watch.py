"""Watching a manifesto: every save is compiled, swapped into the live model, and asked.

Knows files that change, the order of the stages and their times. Does not know how what
happened is shown. What the process has once (weights, tokenizer, live model, references)
it keeps from save to save.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from watchfiles import watch as changes

import superego
from superego.adapter import Adapter
from superego.atomic import check_writable
from superego.base import BaseModel
from superego.chat import Chat
from superego.converters.amend import known_replies
from superego.converters.compile import Opened, Settings, compile_manifesto, open_for_compile
from superego.converters.kept import Known
from superego.errors import SuperegoError
from superego.manifesto import Manifesto, read_manifesto
from superego.progress import Steps
from superego.runtime import default_threads, load
from superego.template import ChatTemplate

REPLY_TOKENS = 64
HURRIED = Settings("quick", 2, unseen=12, rank=96, ridge=0.4, ridge_ffn=1.5, seed=0, most=48)


@dataclass(frozen=True)
class Turn:
    """What one save led to. Times in seconds."""

    manifesto: Manifesto
    replies: list[tuple[str, str, str]]  # question, reply before, reply now
    recovered: float  # KL, on unseen references
    kept: int  # references that still held
    references: int
    seconds: dict[str, float]  # stage -> time; "whole" from the save to the last reply


@dataclass(frozen=True)
class Problem:
    """A save that could not be compiled, and why. Watching goes on."""

    message: str


@dataclass
class Workshop:
    """A base in memory and on a live model, and what the last save gave.

    `output` is written anew at every save. Raises SuperegoError for a base that cannot be
    compiled on.
    """

    model: BaseModel
    output: Path
    questions: Sequence[str]
    settings: Settings = HURRIED
    threads: int | None = None
    quiet: bool = True  # no progress on stderr

    def __post_init__(self) -> None:
        check_writable(self.output)
        torch.set_num_threads(self.threads or default_threads())
        torch.set_grad_enabled(False)
        self.template = ChatTemplate(self.model.header)
        self.llm = load(self.model, n_ctx=1024, threads=self.threads)
        with Steps(self.quiet) as steps:
            self.opened: Opened = open_for_compile(self.model, self.llm, steps)
        self._said = [self._reply(question) for question in self.questions]
        self.last: Manifesto | None = None
        self._known: Known | None = None

    def _reply(self, question: str) -> str:
        talk = Chat(self.llm, self.template)
        return "".join(talk.reply(question, REPLY_TOKENS)).strip()

    def turn(self, manifesto: Manifesto, saved: float | None = None) -> Turn:
        """Compile, swap, ask. `saved` is when the file was written (time.time()).

        Raises SuperegoError for a manifesto that does not fit; what was attached stays.
        """
        started = time.perf_counter()
        waited = max(0.0, time.time() - saved) if saved is not None else 0.0
        with Steps(self.quiet) as steps:  # off the terminal before anything is shown
            report = compile_manifesto(
                manifesto,
                self.model,
                self.output,
                self.settings,
                threads=self.threads,
                steps=steps,
                opened=self.opened,
                known=self._known,
            )
        compiled = time.perf_counter()
        adapter = superego.swap(self.llm, self.output).adapter
        swapped = time.perf_counter()
        before, self._said = self._said, [self._reply(q) for q in self.questions]
        self.last = manifesto
        if isinstance(adapter, Adapter):
            self._known = known_replies(adapter, self.model.header)
        now = time.perf_counter()
        stages = report["seconds"]
        seconds = {
            "notice": waited,
            "prompts": stages["load"],
            "references": stages["references"],
            "fit": stages["fit"],
            "measure": stages["measure"],
            "write": stages["write"],
            "swap": swapped - compiled,
            "reply": now - swapped,
            "whole": waited + now - started,
        }
        return Turn(
            manifesto,
            list(zip(self.questions, before, self._said, strict=True)),
            report["kl recovered on unseen references"],
            report["references kept"],
            report["references"],
            {name: round(value, 2) for name, value in seconds.items()},
        )


def watch(path: Path, workshop: Workshop, stop: threading.Event) -> Iterator[Turn | Problem]:
    """A Turn or a Problem for the file as it is, then for every save, until `stop` is set.

    The folder is watched, not the file: editors save by renaming a new file onto the old
    one. A file that is gone, half-written or broken is a Problem, and the next save is
    waited for. Raises SuperegoError where the folder is not there.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise SuperegoError(f"{path}: folder {path.parent} does not exist")

    files = {path, path.resolve()}  # both ends of a link

    def ours(change: Any, changed: str) -> bool:
        return Path(changed) in files

    told: str | None = None  # the last problem, not to tell it twice
    events = changes(
        *{file.parent for file in files},
        watch_filter=ours,
        debounce=400,
        step=50,
        recursive=False,
        stop_event=stop,
        rust_timeout=500,
        yield_on_timeout=True,
        raise_interrupt=True,
    )
    first = True
    for event in events:
        if not event and not first:
            continue
        try:
            saved = None if first else _saved(path)
            first = False
            manifesto = read_manifesto(path)
            if workshop.last is None or manifesto.sha256 != workshop.last.sha256:
                yield workshop.turn(manifesto, saved)  # else touched, or saved as it was
            told = None
        except SuperegoError as error:
            if str(error) != told:
                yield Problem(str(error))
            told = str(error)


def _saved(path: Path) -> float:
    """When the file was last written or renamed to its name (time.time())."""
    try:
        status = path.stat()
    except OSError:
        raise SuperegoError(f"{path}: is gone; waiting for it to come back") from None
    return max(status.st_mtime, status.st_ctime)  # a renamed file keeps its own mtime

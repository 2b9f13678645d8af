"""Distil and refine: adapters trained towards the manifesto's teacher, within a time budget.

Knows the order of the steps, what is trained on and what is written. Does not know gradients.
Distilling is context distillation: a new adapter learns what the base says behind the
manifesto. Refining starts from an adapter, closed form or trained, and never makes it worse.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import superego
from superego.adapter import Adapter, check_fit, write_adapter
from superego.atomic import check_writable, replacing
from superego.base import BaseModel
from superego.converters import refit
from superego.converters.adapter_changes import changes_of, pairs
from superego.converters.checkpoint import Checkpoint, Origin, read_checkpoint
from superego.converters.compile import METHOD, Opened, open_for_compile
from superego.converters.examples import Example, as_conversations
from superego.converters.heap import kept_heap
from superego.converters.kept import stored
from superego.converters.metadata import Metadata, described
from superego.converters.references import BLOCKS, Prompts, prepare, seeds
from superego.converters.runtime_cells import Corrected, correct_cells
from superego.converters.slot import Slot
from superego.converters.streams import Changes, Conversation
from superego.converters.student import MATRICES, Student
from superego.converters.training import Lessons, Outcome, Plan, Unseen, train
from superego.errors import SuperegoError
from superego.exchanges import kept_references
from superego.gguf_file import check_unchanged
from superego.history import manifesto_of, with_entry
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.runtime import default_threads, load, peak_memory

if TYPE_CHECKING:
    from llama_cpp import Llama

_BLOCKS = 8  # of references at most, where the start has no more
UNSEEN = 48  # conversations that are measured on, at most; neither start nor training fits them
_LEAST_UNSEEN = 12
_NEUTRAL = 120  # plain texts that are to stay as they are
_WRITING = 0.4  # of the budget, at most, for the references
# of the budget, behind a fit that was better and one that was not; less is not worth preparing
_LEAST_TRAINING, _LEAST_WITHOUT_GAIN = 0.25, 0.1
_DISTILL_RATE, _REFINE_RATE = 2e-3, 2e-4  # of Adam
_REFINE_ROWS = 2048  # of a step: what is left to gain is less than what few rows say by chance


@dataclass(frozen=True)
class Options:
    """What a training is asked for."""

    minutes: float
    rank: int = 16
    targets: tuple[str, ...] = MATRICES
    seed: int = 0
    threads: int | None = None
    use_cache: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise SuperegoError(
                f"--minutes {self.minutes:g}: expected more than 0 and at most a day"
            )
        unknown = [name for name in self.targets if name not in MATRICES]
        if unknown or not self.targets:
            raise SuperegoError(
                f"--targets: {', '.join(unknown) or 'none'}: expected some of {', '.join(MATRICES)}"
            )


@dataclass(frozen=True)
class _Job:
    """One training: what it is asked for, and where it goes."""

    method: str
    manifesto: Manifesto
    model: BaseModel
    output: Path
    options: Options
    start: Adapter | None
    examples: tuple[Path, list[Example]] | None
    steps: Steps

    @property
    def budget(self) -> float:
        """Seconds, of the whole command."""
        return self.options.minutes * 60

    @property
    def checkpoint(self) -> Path:
        return self.output.with_name(self.output.name + ".training")

    @property
    def fits_again(self) -> bool:
        """Whether the start is a closed form to refine: more references make it better."""
        closed = self.start is not None and self.start.own.get("method") == METHOD
        return closed and self.method == "refine" and self.examples is None


@dataclass(frozen=True)
class _Material:
    """What a training learns from and is measured on."""

    opened: Opened
    prompts: Prompts
    seen: list[Conversation]  # all but the unseen ones
    fits: int  # how many of them a new fit has time for
    unseen: list[Conversation]
    lessons: list[Conversation]  # of the seen ones, what is trained on
    own: list[Conversation]  # the user's examples
    fitted: int  # how many the start was made from

    @property
    def conversations(self) -> list[Conversation]:
        return [*self.seen, *self.unseen]


@dataclass
class _Beginning:
    """What the training starts with."""

    student: Student
    kl: float | None  # of the student on the unseen conversations, where it was measured
    origin: Origin | None = None  # that it was fitted to be, where it is not the file's
    kl_file: float | None = None  # of the file, where another fit was tried or is gone on with
    interrupted: bool = False
    fitted: int = 0  # references that the origin was fitted to, and its last layers
    last: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # that it was fitted by


def distill(
    manifesto: Manifesto,
    model: BaseModel,
    output: Path,
    options: Options,
    start: Adapter | None = None,
    examples: tuple[Path, list[Example]] | None = None,
    steps: Steps | None = None,
    opened: Opened | None = None,
) -> dict[str, Any]:
    """Train an adapter for `manifesto` and write it; returns what was done and what it cost.

    With `start` the training goes on from that adapter. What is written is the best by KL on
    conversations that it was not trained on. Raises SuperegoError before any work.
    """
    if start is not None:
        check_fit(start, model.header)
    steps = steps or Steps(quiet=True)
    job = _Job("distill", manifesto, model, output, options, start, examples, steps)
    return _run(job, opened)


def refine(
    adapter: Adapter,
    model: BaseModel,
    output: Path,
    options: Options,
    examples: tuple[Path, list[Example]] | None = None,
    steps: Steps | None = None,
    opened: Opened | None = None,
) -> dict[str, Any]:
    """Train an adapter further towards its own manifesto; never worse than it was.

    Where training gains nothing on unseen conversations the adapter is written as it is, and
    the report says so. Raises SuperegoError before any work.
    """
    check_fit(adapter, model.header)
    steps = steps or Steps(quiet=True)
    manifesto = manifesto_of(adapter)
    job = _Job("refine", manifesto, model, output, options, adapter, examples, steps)
    return _run(job, opened)


@kept_heap()
def _run(job: _Job, opened: Opened | None) -> dict[str, Any]:
    started = time.perf_counter()
    model, options, start, output = job.model, job.options, job.start, job.output
    own_files = [job.examples[0]] if job.examples is not None else []
    check_writable(output, *model.files, *own_files)
    check_writable(job.checkpoint, *model.files, *own_files, *([start.path] if start else []))
    settings = _settings(options, start)
    torch.set_num_threads(options.threads or default_threads())
    torch.set_grad_enabled(False)
    saved = read_checkpoint(job.checkpoint) if options.resume else None
    llm = opened.llm if opened else load(model, threads=options.threads, vocab_only=True)
    until = started + refit.fitting_seconds(job.budget)
    material = _gather(job, llm, opened, saved, until)
    gathered = time.perf_counter() - started
    base, prefixes = material.opened.base, material.prompts.prefixes
    measured = Unseen(base, material.unseen, prefixes)
    key = _key(job, [*material.lessons, *material.own])
    begun = _begin(job, material, measured, settings, until, saved, key)
    settings = {**settings, **begun.settings}
    spent = time.perf_counter() - started
    seconds = {"references": gathered}
    if begun.kl is not None:
        seconds["fit"] = spent - gathered
    outcome = None
    least = job.budget * (_LEAST_TRAINING if begun.origin else _LEAST_WITHOUT_GAIN)
    # where another fit was tried in this run, little time may be left
    if begun.kl is not None and (
        begun.interrupted or (saved is None and job.budget - spent < least)
    ):
        outcome = Outcome({}, measured.kl_base, begun.kl, begun.kl, 0, 0.0)
        outcome.interrupted = begun.interrupted
        if not begun.interrupted:
            outcome.changes = begun.student.changes()
            outcome.curve.append((spent, outcome.recovered))
    else:
        texts, front = neutral(llm)
        lessons = Lessons(
            base, material.lessons, prefixes, texts, front, material.own, options.seed
        )
        spent = time.perf_counter() - started
        if spent >= job.budget and begun.kl_file is None:
            raise SuperegoError(
                f"--minutes {options.minutes:g}: reading the base and writing the references took "
                f"{spent:.0f} s of the {job.budget:.0f} s; they are kept, so the next run has "
                "more, or give more minutes"
            )
        plan = Plan(
            max(job.budget - spent, 1.0),
            _DISTILL_RATE if start is None else _REFINE_RATE,
            rows=None if start is None else _REFINE_ROWS,
            seed=options.seed,
            references=len(material.conversations),
            origin=begun.origin,
            fitted=begun.fitted,
            last=begun.last,
            # an adapter that is all new changes nothing yet
            kl_start=measured.kl_base if start is None else begun.kl,
        )

        def told(spent: float, total: float, loss: float, recovered: float) -> None:
            now = f"loss {loss:.4f}, KL recovered {recovered:.3f}"
            job.steps.update("training", min(round(spent), round(total)), round(total), now)

        outcome = train(begun.student, lessons, measured, plan, told, job.checkpoint, key, saved)
    if begun.kl_file is not None:
        outcome.kl_start = begun.kl_file
    corrected = None
    check_unchanged(model.header, *([start.header] if start is not None else []))
    if start is not None and not outcome.gained:
        copied = start.path.read_bytes()
        with replacing(output) as temporary:
            temporary.write_bytes(copied)
    else:
        corrected = _corrected(job, material, begun.student.slot, outcome.changes)
        outcome.changes = corrected.changes if corrected else outcome.changes
        _write(job, settings, outcome, material)
    if not outcome.interrupted:
        job.checkpoint.unlink(missing_ok=True)
    return _report(job, outcome, material, seconds, begun, corrected)


def _gather(
    job: _Job, llm: Llama, opened: Opened | None, saved: Checkpoint | None, until: float
) -> _Material:
    """Write the references, or read what is there, and part them; opens the base for it.

    A closed form of them is to be there `until` then.
    """
    model, options = job.model, job.options
    fitted = _fitted(job.start, model)
    ends = list(itertools.accumulate(BLOCKS))
    # some must be left that the start has not seen
    enough = (i + 1 for i, end in enumerate(ends) if end - len(fitted) >= _LEAST_UNSEEN)
    least = next(enough, len(BLOCKS))
    most = max(refit.blocks_within(model, job.budget) if job.fits_again else _BLOCKS, least)
    prompts = prepare(llm, model, job.manifesto, seeds(options.seed)[: ends[most - 1]])
    own = []
    if job.examples is not None:
        own = as_conversations(llm, model, *job.examples, prompts.prefixes.student)
    opened = opened or open_for_compile(model, llm, job.steps, prompts, use_cache=options.use_cache)
    if not opened.base.resident:
        raise SuperegoError(
            f"{model.path}: training keeps all weights in memory, and they do not fit what is "
            "free; compile needs less"
        )
    seconds = until - time.perf_counter() if job.fits_again else _WRITING * job.budget
    had = saved.references if saved else None
    if had is not None:  # as many again: what is gone on with must have been made from the same
        least, seconds = next((i + 1 for i, end in enumerate(ends) if end >= had), most), 0.0
        prompts = replace(prompts, rest=prompts.rest[:had])
    allowed = refit.Allowance(least, most, seconds, job.fits_again, UNSEEN)
    before = _leading(job.start, model, prompts)
    conversations, fits = refit.write_within(
        llm, opened, model, prompts, allowed, before, options.use_cache, job.steps
    )
    if saved is not None:  # nothing is fitted again
        fits = saved.fitted
    fresh = [c for c in conversations if tuple(c.prompt) not in fitted]
    unseen_n = min(UNSEEN, len(conversations) // 5, len(fresh))
    if not unseen_n:
        raise SuperegoError(
            f"{job.output}: no conversation is left that the start was not fitted on; there would "
            "be nothing to measure by"
        )
    unseen, fresh = fresh[-unseen_n:], fresh[:-unseen_n]
    measured_on = {id(c) for c in unseen}
    seen = [c for c in conversations if id(c) not in measured_on]
    lessons = fresh if len(fresh) >= len(seen) // 4 else seen
    return _Material(opened, prompts, seen, fits, unseen, lessons, own, len(fitted))


def _begin(
    job: _Job,
    material: _Material,
    measured: Unseen,
    settings: dict[str, Any],
    until: float,
    saved: Checkpoint | None,
    key: str,
) -> _Beginning:
    """The start as a student, or a closed form of all references where that is better.

    It is to be there `until` then. `settings` are the start's, and what an interrupted run with
    this key began with is not fitted again.
    """
    base, start, options = material.opened.base, job.start, job.options
    changes: Origin = changes_of(start) if start is not None else ({}, None)
    origin = saved.origin(key) if saved else None
    student = Student(base, *(origin or changes))
    if start is None:
        student.add(options.rank, options.targets, options.seed)
    student.keep_slot()
    seen = material.seen[: material.fits]
    if saved and origin:
        kl = measured.of(Student(base, *changes))
        anew = refit.settings_for(settings, len(seen), base)
        return _Beginning(student, None, origin, kl, False, len(seen), saved.last, anew)
    least = refit.least(material.fitted)
    if not job.fits_again or len(seen) < least:
        return _Beginning(student, None)
    before = measured.of(student)
    try:
        found = refit.fit_again(
            material.opened, material.prompts, seen, settings, until, job.steps, least
        )
    except KeyboardInterrupt:
        return _Beginning(student, before, None, before, interrupted=True)
    if found is not None:
        fitted = Student(base, *found.origin)
        kl = measured.of(fitted)
        if kl < before:
            n, last = found.references, found.last
            return _Beginning(fitted, kl, found.origin, before, False, n, last, found.settings)
    return _Beginning(student, before, None, before)


def _leading(start: Adapter | None, model: BaseModel, prompts: Prompts) -> list[Conversation]:
    """What the start keeps of the first of these prompts: it need not be written again."""
    kept = kept_references(start, model.header) if start is not None else []
    same = itertools.takewhile(
        lambda pair: pair[0][0] == pair[1], zip(kept, prompts.rest, strict=False)
    )
    return [Conversation(*exchange) for exchange, _ in same]


def _fitted(start: Adapter | None, model: BaseModel) -> set[tuple[int, ...]]:
    """The prompts that the start was made from; those it only measured on stand last."""
    if start is None:
        return set()
    kept = kept_references(start, model.header)
    return {tuple(p) for p, _ in kept[: len(kept) - int(start.number("references.unseen", 0))]}


def neutral(llm: Llama) -> tuple[list[Conversation], list[int]]:
    """Seed messages as plain text, without a template, behind what plain text starts with."""
    front = llm.tokenize(b"\n", add_bos=True, special=False)
    found = [
        llm.tokenize(line.encode(), add_bos=False, special=False) for line in seeds(0)[:_NEUTRAL]
    ]
    return [Conversation(tokens[:1], tokens[1:]) for tokens in found if len(tokens) > 3], front


def _key(job: _Job, lessons: Sequence[Conversation]) -> str:
    """What a checkpoint must have been made from to be gone on with."""
    parts = [
        job.method,
        superego.__version__,
        job.model.fingerprint,
        job.manifesto.sha256,
        job.options.rank,
        job.options.targets,
        job.options.seed,
        hashlib.sha256(job.start.path.read_bytes()).hexdigest() if job.start else "",
        [[c.prompt, c.reply] for c in lessons],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _settings(options: Options, start: Adapter | None) -> dict[str, Any]:
    """What is recorded: those that the start was made with, and the training's own."""
    try:
        before = json.loads(start.own.get("settings", "{}")) if start is not None else {}
        if not isinstance(before, dict):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        path = start.path if start is not None else ""
        raise SuperegoError(f"{path}: superego.settings is damaged") from None
    return {
        **before,
        "minutes": options.minutes,
        "training seed": options.seed,
        **({"rank": options.rank, "targets": options.targets} if start is None else {}),
    }


def _corrected(
    job: _Job, material: _Material, own: Slot | None, changes: Changes
) -> Corrected | None:
    """The changes with their cells put right in llama.cpp, where the slot is this version's."""
    opened, prefixes = material.opened, material.prompts.prefixes
    if own is None:
        return None
    slot = opened.slots.of(opened.base, [c.prompt for c in material.seen], prefixes)
    if slot is None or (slot.layer, slot.neurons) != (own.layer, own.neurons):
        return None
    student, threads, budget = prefixes.student, job.options.threads, opened.sizes.budget
    return correct_cells(
        opened.base, job.model, changes, slot, student, threads, budget, job.steps.note
    )


def _write(job: _Job, settings: dict[str, Any], outcome: Outcome, material: _Material) -> None:
    conversations = material.conversations
    keys: Metadata = {
        "adapter.lora.task_name": job.manifesto.name,
        "superego.settings": json.dumps(settings, sort_keys=True),
        "superego.reference_tokens": sum(len(c.prompt) + len(c.reply) for c in conversations),
        "superego.kl_recovered": outcome.recovered,
        "superego.references": stored(job.model, conversations),
        "superego.references.unseen": len(material.unseen),
    }
    method = job.method
    if job.start is not None:
        note = {"minutes": settings["minutes"], "recovered": round(outcome.recovered, 4)}
        keys["superego.history"] = with_entry(job.start, method, None, **note)
        method = f"{job.start.own.get('method', '?')}+{method}"
    metadata = described(job.manifesto, job.model, method, keys)
    write_adapter(job.output, job.model.architecture, pairs(outcome.changes), metadata)


def _report(
    job: _Job,
    outcome: Outcome,
    material: _Material,
    seconds: dict[str, float],
    begun: _Beginning,
    corrected: Corrected | None,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "adapter": str(job.output),
        "bytes": job.output.stat().st_size,
        "method": job.method,
        "better than its start": outcome.gained,
        "kl recovered on unseen references": round(outcome.recovered, 4),
        "kl recovered at the start": round(outcome.recovered_at_start, 4),
        "kl base": round(outcome.kl_base, 4),
        "steps": outcome.steps,
        **({"fitted to": [begun.fitted, begun.last]} if begun.last else {}),
        **(corrected.report() if corrected else {}),
        "trained on": len(material.lessons),
        "own examples": len(material.own),
        "curve": [(round(s, 1), round(r, 4)) for s, r in outcome.curve],
        "seconds": {
            **{name: round(value, 1) for name, value in seconds.items()},
            "training": round(outcome.seconds, 1),
        },
        "peak memory MB": peak_memory() // 2**20,
    }
    if outcome.interrupted:
        report["interrupted"] = f"go on with --resume ({job.checkpoint})"
    return report

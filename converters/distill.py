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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

import superego
from superego.adapter import Adapter, check_fit, write_adapter
from superego.atomic import check_writable, replacing
from superego.base import BaseModel
from superego.converters.closed_form import solve
from superego.converters.compile import (
    METHOD,
    Opened,
    Settings,
    fit_seconds,
    open_for_compile,
    pairs,
    writing_seconds,
)
from superego.converters.examples import Example, as_conversations
from superego.converters.kept import stored
from superego.converters.metadata import Metadata, described
from superego.converters.references import BLOCKS, Prompts, prepare, seeds, write_replies
from superego.converters.shape import read_shape
from superego.converters.slot import Slot
from superego.converters.streams import Change, Changes, Conversation
from superego.converters.student import MATRICES, Student
from superego.converters.training import (
    Lessons,
    Outcome,
    Plan,
    Unseen,
    origin_of,
    references_of,
    train,
)
from superego.converters.transformer import Base, probe_dtype
from superego.errors import SuperegoError
from superego.exchanges import kept_references
from superego.gguf_file import check_unchanged
from superego.history import manifesto_of, with_entry
from superego.manifesto import Manifesto
from superego.pairs import read_pairs, slot_ranks
from superego.progress import Steps
from superego.runtime import default_threads, load, peak_memory

if TYPE_CHECKING:
    from llama_cpp import Llama

_BLOCKS = 5  # of references at most, where the start has no more
UNSEEN = 48  # conversations that are measured on, at most; neither start nor training fits them
_LEAST_UNSEEN = 12
_MORE = 1.25  # times the references that the start was fitted on; fewer are not fitted again
_NEUTRAL = 120  # plain texts that are to stay as they are
_WRITING = 0.4  # of the budget, at most, for the references
_AGAIN = 0.8  # of the budget, at most, for the references and a fit to all of them
_ROWS = 48  # tokens of a reference, about
_EACH = 0.01  # seconds that one takes beside all products, at least
_LEAST_TRAINING = 0.25  # of the budget, behind a fit; less is not worth what it takes to prepare
_DISTILL_RATE, _REFINE_RATE = 2e-3, 2e-4  # of Adam


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
    return _run("distill", manifesto, model, output, options, start, examples, steps, opened)


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
    manifesto = manifesto_of(adapter)
    return _run("refine", manifesto, model, output, options, adapter, examples, steps, opened)


def _run(
    method: str,
    manifesto: Manifesto,
    model: BaseModel,
    output: Path,
    options: Options,
    start: Adapter | None,
    examples: tuple[Path, list[Example]] | None,
    steps: Steps | None,
    opened: Opened | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    budget = options.minutes * 60
    steps = steps or Steps(quiet=True)
    own_files = [examples[0]] if examples is not None else []
    check_writable(output, *model.files, *own_files)
    checkpoint = output.with_name(output.name + ".training")
    check_writable(checkpoint, *model.files, *own_files, *([start.path] if start else []))
    settings = _settings(options, start)
    torch.set_num_threads(options.threads or default_threads())
    torch.set_grad_enabled(False)
    llm = opened.llm if opened else load(model, threads=options.threads, vocab_only=True)
    known = _fitted(start, model)
    ends = list(itertools.accumulate(BLOCKS))
    # some must be left that the start has not seen
    enough = (i + 1 for i, end in enumerate(ends) if end - len(known) >= _LEAST_UNSEEN)
    least = next(enough, len(BLOCKS))
    # a closed form goes on with more references, fitted anew, where that leaves time
    again = start is not None and method == "refine" and start.own.get("method") == METHOD
    again = again and examples is None
    most = max(_fitting(model, budget) if again else _BLOCKS, least)
    prompts = prepare(llm, model, manifesto, seeds(options.seed)[: ends[most - 1]])
    own = []
    if examples is not None:
        own = as_conversations(llm, model, *examples, prompts.prefixes.student)
    opened = opened or open_for_compile(model, llm, steps, prompts)
    if not opened.base.resident:
        raise SuperegoError(
            f"{model.path}: training keeps all weights in memory, and they do not fit what is "
            "free; compile needs less"
        )
    had = references_of(checkpoint) if options.resume else None
    if had is not None:  # as many again: what is gone on with must have been made from the same
        least = next((i + 1 for i, end in enumerate(ends) if end >= had), most)
    share = (_AGAIN if again else _WRITING) * budget if had is None else 0.0
    before = _leading(start, model, prompts)
    conversations = _references(
        llm, opened, model, prompts, options, share, (least, most), before, again, steps
    )
    fresh = [c for c in conversations if tuple(c.prompt) not in known]
    unseen_n = min(UNSEEN, len(conversations) // 5, len(fresh))
    if not unseen_n:
        raise SuperegoError(
            f"{output}: no conversation is left that the start was not fitted on; there would be "
            "nothing to measure by"
        )
    unseen, fresh = fresh[-unseen_n:], fresh[:-unseen_n]
    measured_on = {id(c) for c in unseen}
    seen = [c for c in conversations if id(c) not in measured_on]
    lessons = fresh if len(fresh) >= len(seen) // 4 else seen
    conversations = [*seen, *unseen]
    measured = Unseen(opened.base, unseen, prompts.prefixes)
    key = _key(method, model, manifesto, options, start, [*lessons, *own])
    origin = origin_of(checkpoint, key) if options.resume else None
    begun = changes_of(start) if start is not None else (dict[tuple[int, str], Change](), None)
    student = Student(opened.base, *(origin or begun))
    if start is None:
        student.add(options.rank, options.targets, options.seed)
    student.keep_slot()
    kl_start = None  # of the file, where the training starts from another fit
    anew = _anew(settings, len(seen), opened.base)
    outcome = None
    kl_now = 0.0  # of the student, where it was fitted in this run
    if origin:
        kl_start = measured.of(Student(opened.base, *begun))
    elif again and len(seen) >= _MORE * len(known):
        kl_start = kl_now = measured.of(student)
        try:
            found = _fit_again(opened, prompts, seen, anew, steps)
        except KeyboardInterrupt:
            outcome = Outcome({}, measured.kl_base, kl_start, kl_start, 0, 0.0, interrupted=True)
        else:
            fitted = Student(opened.base, *found)
            kl = measured.of(fitted)
            if kl < kl_start:
                origin, student, kl_now = found, fitted, kl
    settings = {**settings, **anew} if origin else settings
    spent = time.perf_counter() - started
    fitted_now = kl_start is not None and had is None
    if outcome is None and fitted_now and budget - spent < _LEAST_TRAINING * budget:
        outcome = Outcome(student.changes(), measured.kl_base, kl_now, kl_now, 0, 0.0)
        outcome.curve.append((spent, outcome.recovered))
    if outcome is None:
        texts, front = neutral(llm)
        taught = Lessons(opened.base, lessons, prompts.prefixes, texts, front, own, options.seed)
        spent = time.perf_counter() - started
        if spent >= budget and kl_start is None:
            raise SuperegoError(
                f"--minutes {options.minutes:g}: reading the base and writing the references took "
                f"{spent:.0f} s of the {budget:.0f} s; they are kept, so the next run has more, or "
                "give more minutes"
            )
        outcome = train(
            student,
            taught,
            measured,
            Plan(
                max(budget - spent, 1.0),
                _DISTILL_RATE if start is None else _REFINE_RATE,
                seed=options.seed,
                references=len(conversations),
                origin=origin,
            ),
            lambda spent, total, loss, recovered: steps.update(
                "training",
                min(round(spent), round(total)),
                round(total),
                f"KL recovered {recovered:.3f}",
            ),
            checkpoint,
            key,
            options.resume,
        )
    if kl_start is not None:
        outcome.kl_start = kl_start
    check_unchanged(model.header, *([start.header] if start is not None else []))
    if start is not None and not outcome.gained:
        copied = start.path.read_bytes()
        with replacing(output) as temporary:
            temporary.write_bytes(copied)
    else:
        _write(method, output, manifesto, model, settings, start, outcome, conversations, unseen_n)
    if not outcome.interrupted:
        checkpoint.unlink(missing_ok=True)
    return _report(method, output, options, start, outcome, lessons, own, spent, checkpoint)


def _fitted(start: Adapter | None, model: BaseModel) -> set[tuple[int, ...]]:
    """The prompts that the start was made from; those it only measured on stand last."""
    if start is None:
        return set()
    kept = kept_references(start, model.header)
    return {tuple(p) for p, _ in kept[: len(kept) - int(start.number("references.unseen", 0))]}


def _leading(start: Adapter | None, model: BaseModel, prompts: Prompts) -> list[Conversation]:
    """What the start keeps of the first of these prompts: it need not be written again."""
    kept = kept_references(start, model.header) if start is not None else []
    same = itertools.takewhile(
        lambda pair: pair[0][0] == pair[1], zip(kept, prompts.rest, strict=False)
    )
    return [Conversation(*exchange) for exchange, _ in same]


def _references(
    llm: Llama,
    opened: Opened,
    model: BaseModel,
    prompts: Prompts,
    options: Options,
    share: float,
    between: tuple[int, int],
    before: Sequence[Conversation],
    fitted: bool,
    steps: Steps,
) -> list[Conversation]:
    """As many blocks of references as take no more than their `share` of the time, in seconds.

    With a fit to all of them, where they are to be `fitted`. Their number is `between` two; those
    of `before` are there. What a block took tells what the next one will; an estimate where none
    was written yet.
    """
    shape, rate = opened.base.shape, opened.rate
    started = time.perf_counter()
    blocks, most = between
    found: Sequence[Conversation] = before
    each: float | None = None  # seconds
    while True:
        mark, there = time.perf_counter(), len(found)
        found, cached = write_replies(
            llm,
            opened.base,
            model.fingerprint,
            prompts,
            blocks,
            options.use_cache,
            lambda done, total: steps.update("writing references", done, total),
            opened.sizes.room,
            found,
        )
        if len(found) - cached > there:
            each = (time.perf_counter() - mark) / (len(found) - cached - there)
        rows = sum(len(c.prompt) + len(c.reply) for c in found) / len(found)
        if blocks >= most:
            return found
        size = BLOCKS[blocks]
        expected = writing_seconds(shape, round(rows * size), rate) if each is None else each * size
        if fitted:
            expected += fit_seconds(shape, round(rows * (len(found) + size)), rate)
        if time.perf_counter() - started + expected > share:
            return found
        blocks += 1


def _fitting(model: BaseModel, budget: float) -> int:
    """How many blocks of references may be fitted in their share of the time."""
    shape, rate = read_shape(model.header), probe_dtype()[1]
    ends = itertools.accumulate(BLOCKS)
    seconds = (fit_seconds(shape, _ROWS * end, rate) + _EACH * end for end in ends)
    return sum(each < _AGAIN * budget for each in seconds)


def _anew(settings: dict[str, Any], n: int, base: Base) -> dict[str, Any]:
    """The settings of a fit to n references, of a rank no less than there was."""
    known = Settings.for_references(n)
    before = settings.get("rank", 0)
    rank = min(max(known.rank, before if type(before) is int else 0), base.shape.d_model)
    return {"rank": rank, "ridge": known.ridge, "ridge_ffn": known.ridge_ffn, "most": n}


def _fit_again(
    opened: Opened,
    prompts: Prompts,
    seen: Sequence[Conversation],
    settings: dict[str, Any],
    steps: Steps,
) -> tuple[Changes, Slot | None]:
    """The closed form of all references that are there now."""
    changes = solve(
        opened.base,
        seen,
        prompts.prefixes,
        settings["rank"],
        {"attn_output": settings["ridge"], "ffn_down": settings["ridge_ffn"]},
        lambda done, total: steps.update("solving layers", done, total),
        opened.slots,
    )
    return changes, opened.slots[tuple(prompts.prefixes.student)]


def changes_of(adapter: Adapter) -> tuple[Changes, Slot | None]:
    """An adapter's pairs as changes, and its slot where it has one."""
    changes: Changes = {}
    for name, (a, b) in read_pairs(adapter).items():
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in MATRICES:
            raise SuperegoError(
                f"{adapter.path}: adapts {name}; training knows {', '.join(MATRICES)} of a layer"
            )
        changes[int(parts[1]), parts[2]] = Change(torch.from_numpy(a), torch.from_numpy(b))
    ranks = slot_ranks(adapter)
    if not ranks:
        return changes, None
    marks: dict[tuple[int, str], Change] = {}
    layer = neuron = 0
    for name, chosen in ranks.items():
        index, matrix = int(name.split(".")[1]), name.split(".")[2]
        if matrix in ("attn_k", "attn_v"):
            continue
        change = changes[index, matrix]
        keep = torch.from_numpy(np.flatnonzero(chosen))
        rest = torch.from_numpy(np.flatnonzero(~chosen))
        marks[index, matrix] = Change(change.a[keep], change.b[:, keep])
        order = torch.cat([keep, rest])  # a mark's ranks stand first
        changes[index, matrix] = Change(change.a[order], change.b[:, order])
        if matrix == "ffn_gate":
            layer, neuron = index, int(change.b.abs().amax(1).argmax())
    mark = marks[layer, "ffn_down"]
    direction = F.normalize((mark.b @ mark.a)[:, neuron], dim=0)
    return changes, Slot(0, layer, neuron, direction, marks)


def neutral(llm: Llama) -> tuple[list[Conversation], list[int]]:
    """Seed messages as plain text, without a template, behind what plain text starts with."""
    front = llm.tokenize(b"\n", add_bos=True, special=False)
    found = [
        llm.tokenize(line.encode(), add_bos=False, special=False) for line in seeds(0)[:_NEUTRAL]
    ]
    return [Conversation(tokens[:1], tokens[1:]) for tokens in found if len(tokens) > 3], front


def _key(
    method: str,
    model: BaseModel,
    manifesto: Manifesto,
    options: Options,
    start: Adapter | None,
    lessons: Sequence[Conversation],
) -> str:
    """What a checkpoint must have been made from to be gone on with."""
    parts = [
        method,
        superego.__version__,
        model.fingerprint,
        manifesto.sha256,
        options.rank,
        options.targets,
        options.seed,
        hashlib.sha256(start.path.read_bytes()).hexdigest() if start else "",
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


def _write(
    method: str,
    output: Path,
    manifesto: Manifesto,
    model: BaseModel,
    settings: dict[str, Any],
    start: Adapter | None,
    outcome: Outcome,
    conversations: Sequence[Conversation],
    unseen: int,
) -> None:
    keys: Metadata = {
        "adapter.lora.task_name": manifesto.name,
        "superego.settings": json.dumps(settings, sort_keys=True),
        "superego.reference_tokens": sum(len(c.prompt) + len(c.reply) for c in conversations),
        "superego.kl_recovered": outcome.recovered,
        "superego.references": stored(model, conversations),
        "superego.references.unseen": unseen,
    }
    if start is not None:
        note = {"minutes": settings["minutes"], "recovered": round(outcome.recovered, 4)}
        keys["superego.history"] = with_entry(start, method, None, **note)
        method = f"{start.own.get('method', '?')}+{method}"
    metadata = described(manifesto, model, method, keys)
    write_adapter(output, model.architecture, pairs(outcome.changes), metadata)


def _report(
    method: str,
    output: Path,
    options: Options,
    start: Adapter | None,
    outcome: Outcome,
    lessons: Sequence[Conversation],
    own: Sequence[Conversation],
    writing: float,
    checkpoint: Path,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "adapter": str(output),
        "bytes": output.stat().st_size,
        "method": method,
        "better than its start": outcome.gained,
        "kl recovered on unseen references": round(outcome.recovered, 4),
        "kl recovered at the start": round(outcome.recovered_at_start, 4),
        "kl base": round(outcome.kl_base, 4),
        "steps": outcome.steps,
        "trained on": len(lessons),
        "own examples": len(own),
        "curve": [(round(s, 1), round(r, 4)) for s, r in outcome.curve],
        "seconds": {"references": round(writing, 1), "training": round(outcome.seconds, 1)},
        "peak memory MB": peak_memory() // 2**20,
    }
    if outcome.interrupted:
        report["interrupted"] = f"go on with --resume ({checkpoint})"
    return report

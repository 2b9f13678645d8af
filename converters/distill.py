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
from superego.converters.compile import Opened, open_for_compile, pairs
from superego.converters.examples import Example, as_conversations
from superego.converters.kept import stored
from superego.converters.metadata import Metadata, described
from superego.converters.references import BLOCKS, Prompts, prepare, seeds, write_replies
from superego.converters.slot import Slot
from superego.converters.streams import Change, Changes, Conversation
from superego.converters.student import MATRICES, Student
from superego.converters.training import Lessons, Outcome, Plan, Unseen, references_of, train
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
_NEUTRAL = 120  # plain texts that are to stay as they are
_WRITING_SHARE = 0.08  # of the matmul peak that writing reaches
_WRITING = 0.4  # of the budget, at most, for the references
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
    most = max(_BLOCKS, least)
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
    changes, slot = changes_of(start) if start is not None else ({}, None)
    student = Student(opened.base, changes, slot)
    if start is None:
        student.add(options.rank, options.targets, options.seed)
    student.keep_slot()
    had = references_of(checkpoint) if options.resume else None
    if had is not None:  # as many again: what is gone on with must have been made from the same
        least = next((i + 1 for i, end in enumerate(ends) if end >= had), most)
    share = _WRITING * budget if had is None else 0.0
    before = _leading(start, model, prompts)
    conversations = _references(
        llm, opened, model, prompts, options, share, (least, most), before, steps
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
    texts, front = neutral(llm)
    taught = Lessons(opened.base, lessons, prompts.prefixes, texts, front, own, options.seed)
    measured = Unseen(opened.base, unseen, prompts.prefixes)
    writing = time.perf_counter() - started
    if writing >= budget:
        raise SuperegoError(
            f"--minutes {options.minutes:g}: reading the base and writing the references took "
            f"{writing:.0f} s of the {budget:.0f} s; they are kept, so the next run has more, or "
            "give more minutes"
        )
    rate = _DISTILL_RATE if start is None else _REFINE_RATE
    key = _key(method, model, manifesto, options, start, [*lessons, *own])
    outcome = train(
        student,
        taught,
        measured,
        Plan(budget - writing, rate, seed=options.seed, references=len(conversations)),
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
    check_unchanged(model.header, *([start.header] if start is not None else []))
    if start is not None and not outcome.gained:
        copied = start.path.read_bytes()
        with replacing(output) as temporary:
            temporary.write_bytes(copied)
    else:
        _write(method, output, manifesto, model, settings, start, outcome, conversations, unseen_n)
    if not outcome.interrupted:
        checkpoint.unlink(missing_ok=True)
    return _report(method, output, options, start, outcome, lessons, own, writing, checkpoint)


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
    steps: Steps,
) -> list[Conversation]:
    """As many blocks of references as take no more than their `share` of the time, in seconds.

    Their number is `between` two; those of `before` are there. The first block's time tells what
    the others will take; an estimate where it was not written now.
    """

    def write(blocks: int, before: Sequence[Conversation]) -> tuple[list[Conversation], int]:
        return write_replies(
            llm,
            opened.base,
            model.fingerprint,
            prompts,
            blocks,
            options.use_cache,
            lambda done, total: steps.update("writing references", done, total),
            opened.sizes.room,
            before,
        )

    mark = time.perf_counter()
    first, cached = write(1, before)
    each = (time.perf_counter() - mark) / BLOCKS[0]
    if cached or len(before) >= BLOCKS[0]:
        rows = sum(len(c.prompt) + len(c.reply) for c in first) / len(first)
        each = 2 * opened.base.shape.n_weights * rows / (opened.rate * 1e9 * _WRITING_SHARE)
    blocks, most = between
    ends = itertools.accumulate(BLOCKS)
    there = max((end for end in ends if end <= len(before)), default=0)
    while blocks < most and each * (sum(BLOCKS[: blocks + 1]) - there) < share:
        blocks += 1
    return first if blocks == 1 else write(blocks, before if there else first)[0]


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

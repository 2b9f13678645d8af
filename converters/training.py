"""Training a student towards a teacher within a time budget, keeping the best it has been.

Knows batches, the schedule and unseen conversations. Does not know manifestos or files of
adapters. The loss is the measure itself: KL(teacher‖student) over the full vocabulary, at the
teacher's own reply tokens, mean a reply, then over replies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from superego.converters.checkpoint import Checkpoint, Origin, write_checkpoint
from superego.converters.gradients import Divergence
from superego.converters.streams import (
    Changes,
    Conversation,
    Pack,
    Prefixes,
    mean_kl,
    predictions,
    token_kl,
)
from superego.converters.student import Pair, Student
from superego.converters.transformer import Base, Rows

_CHUNK_ROWS = 384  # attended to at once: conversations of like length, little padding
_WARM_UP = 8  # steps
_AT_ONCE = 1024  # rows whose activations lie in memory
_ROWS = (128, 2048)  # of a step, at least and at most
_PER_STEP = 8  # rows that a step has for each step that there is time for
_DEARER = 6.0  # a row in a step than one that is measured
_ANCHOR_ROWS = 0.25  # of a step's
_ANCHOR_WEIGHT = 0.5  # of each of the two no-harm terms, at every fourth step
_OWN_WEIGHT = 0.5  # of the user's examples, at every step
_CHECKS = 10  # on unseen conversations, a run, at most
_APART = 5.0  # times what one takes
_RECITED = 6.0  # medians of what the bare base lacks, from which on a reply is not measured on
_BETAS = (0.9, 0.99)  # of Adam

Told = Callable[[float, float, float, float], None]  # seconds, budget, loss, KL recovered
Lesson = tuple[Pack, torch.Tensor]  # conversations, and what is to be said in them


@dataclass(frozen=True)
class Plan:
    """How a student is trained."""

    seconds: float  # of training, checks included
    rate: float  # Adam's step
    rows: int | None = None  # of a step; as many as time allows where it is None
    average: float = 0.9  # of the weights' moving average, which is what is kept
    seed: int = 0
    references: int = 0  # that were written for it; kept for a run that goes on
    origin: Origin | None = None  # that the student was made from, where it is no file's
    fitted: int = 0  # references that it was fitted to, then, and its last layers
    last: int = 0
    kl_start: float | None = None  # of the student on the unseen conversations, where it is known


@dataclass
class Outcome:
    """What a training came to. KL in nats a token on unseen conversations."""

    changes: Changes
    kl_base: float
    kl_start: float
    kl_best: float
    steps: int
    seconds: float
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, KL recovered
    interrupted: bool = False
    resumed: bool = False

    @property
    def recovered(self) -> float:
        """KL recovered on unseen conversations by what is kept."""
        return 1 - self.kl_best / self.kl_base if self.kl_base > 0 else 0.0

    @property
    def recovered_at_start(self) -> float:
        """As `recovered`, before the first step."""
        return 1 - self.kl_start / self.kl_base if self.kl_base > 0 else 0.0

    @property
    def gained(self) -> bool:
        """Whether it is better than its start."""
        return self.kl_best < self.kl_start


class Lessons:
    """Conversations with what the teacher says of them, given out in shuffled packs."""

    def __init__(
        self,
        base: Base,
        conversations: Sequence[Conversation],
        prefixes: Prefixes,
        plain: Sequence[Conversation],
        plain_prefix: list[int],
        own: Sequence[Conversation],
        seed: int,
    ) -> None:
        """`plain` is text without a template behind `plain_prefix`, to stay as it is.

        `own` are the user's examples, whose replies are to be said as they are written.
        """
        self._prefixes = prefixes
        self._conversations = list(conversations)
        self._plain = list(plain)
        self._plain_prefix = plain_prefix
        self._own = list(own)
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._wanted = _Said(base, prefixes.teacher)
        self._unchanged = _Said(base, plain_prefix)

    def packs(self, rows: int) -> Iterator[Lesson]:
        """Packs of about `rows` rows behind the student's prefix, without end, and targets."""
        every, front = self._conversations, self._prefixes.student
        yield from self._endless(lambda: every, front, self._wanted, rows, _AT_ONCE)

    def returns(self, rows: int) -> Iterator[Lesson]:
        """Conversations with the manifesto in front: nothing is to be added to it.

        Of those that `packs` has given out or read ahead: the teacher has been read for them.
        """

        def read() -> list[Conversation]:
            return self._wanted.known(self._conversations) or self._conversations

        yield from self._endless(read, self._prefixes.teacher, self._wanted, rows)

    def neutral(self, rows: int) -> Iterator[Lesson]:
        """Plain text, which is to stay as it is."""
        yield from self._endless(lambda: self._plain, self._plain_prefix, self._unchanged, rows)

    def examples(self, rows: int) -> Iterator[Lesson]:
        """The user's examples and their own tokens, (n,); nothing where there are none."""
        if self._own:
            yield from self._endless(lambda: self._own, self._prefixes.student, _written, rows)

    def _endless(
        self,
        conversations: Callable[[], list[Conversation]],
        prefix: list[int],
        wanted: Callable[[Sequence[Conversation]], torch.Tensor],
        rows: int,
        ahead: int = 0,
    ) -> Iterator[Lesson]:
        """Pass after pass over the conversations that there are then, each shuffled.

        What is wanted is read `ahead` for that many rows: each reading has the prefix in front.
        """
        while True:
            for several in _parted(self._shuffled(conversations()), max(rows, ahead)):
                wanted(several)
                for chosen in _parted(several, rows):
                    yield _lesson(chosen, prefix, wanted)

    def _shuffled(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        order = torch.randperm(len(conversations), generator=self._generator, device="cpu")
        return [conversations[i] for i in order.tolist()]


def _parted(conversations: Sequence[Conversation], rows: int) -> Iterator[list[Conversation]]:
    """The same in parts of so many rows, or of one conversation that has more."""
    part: list[Conversation] = []
    n = 0
    for each in conversations:
        length = len(each.prompt) + len(each.reply) - 1
        if part and n + length > rows:
            yield part
            part, n = [], 0
        part.append(each)
        n += length
    yield part


class _Said:
    """The bare base's last streams before replies, behind a prefix: each computed when asked for.

    A short training on a slow machine sees few of what references there are.
    """

    def __init__(self, base: Base, prefix: list[int]) -> None:
        self._base, self._prefix = base, prefix
        self._known: dict[int, torch.Tensor] = {}  # by the conversation's id

    def known(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those of them for which it need not be computed any more."""
        return [c for c in conversations if id(c) in self._known]

    def __call__(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(n, d_model), one conversation after another."""
        missing = [c for c in conversations if id(c) not in self._known]
        if missing:
            pack = Pack(missing, self._prefix)
            parts = predictions(self._base, pack).split([len(c.reply) for c in pack.conversations])
            self._known |= {id(c): p for c, p in zip(pack.conversations, parts, strict=True)}
        return torch.cat([self._known[id(c)] for c in conversations])


def _written(conversations: Sequence[Conversation]) -> torch.Tensor:
    """The replies' own tokens, (n,)."""
    return torch.cat([torch.tensor(c.reply) for c in conversations])


def _lesson(
    chosen: list[Conversation],
    prefix: list[int],
    wanted: Callable[[Sequence[Conversation]], torch.Tensor],
) -> Lesson:
    pack = Pack(chosen, prefix)
    if torch.get_default_device().type == "cpu":  # a GPU waits for operations, not for padding
        pack.rows = Rows(pack.rows.lengths, len(prefix), _CHUNK_ROWS)
    return pack, wanted(pack.conversations)


class Unseen:
    """Conversations that are not trained on, to measure by.

    Where the teacher says its manifesto word for word, the bare base is ten times as far off as
    elsewhere, and one such reply of 48 would decide what is better. They are left out.
    """

    def __init__(
        self, base: Base, conversations: Sequence[Conversation], prefixes: Prefixes
    ) -> None:
        self._base = base
        pack = Pack(conversations, prefixes.student)
        lengths = [len(c.reply) for c in pack.conversations]
        wanted = predictions(base, Pack(conversations, prefixes.teacher))
        started = time.perf_counter()
        (bare,) = token_kl(base, wanted, predictions(base, pack))
        self.seconds = time.perf_counter() - started  # that a measure took, the last time
        each = torch.stack([part.mean() for part in bare.split(lengths)])
        kept = (each <= _RECITED * each.median()).tolist()
        self._pack = Pack(list(compress(pack.conversations, kept)), prefixes.student)
        self._wanted = torch.cat(list(compress(wanted.split(lengths), kept)))
        self.kl_base = float(each[torch.tensor(kept)].mean())
        self.rows = self._pack.rows.total

    def of(self, student: Student) -> float:
        """KL of a student as it is now, nats a token.

        By the walk that measures a fit, whose prefix is float32 whatever the base's type.
        """
        started = time.perf_counter()
        streams = predictions(self._base, self._pack, student.changes())
        found = mean_kl(self._base, self._pack, self._wanted, streams)
        self.seconds = time.perf_counter() - started
        return found


def train(
    student: Student,
    lessons: Lessons,
    unseen: Unseen,
    plan: Plan,
    told: Told = lambda seconds, budget, loss, recovered: None,
    checkpoint: Path | None = None,
    key: str = "",
    saved: Checkpoint | None = None,
) -> Outcome:
    """Train until the budget is spent; the student ends as the best that it has been.

    What is measured, kept and given back is a moving average of the weights. `checkpoint` is
    a file that is written at every check; training goes on from `saved`, where that has the same
    `key`.
    Ctrl-C ends the training early. The start counts as a candidate: never worse than it.
    """
    started = time.perf_counter()
    kl_start = unseen.of(student) if plan.kl_start is None else plan.kl_start
    until = plan.seconds - unseen.seconds  # the last measure takes as long as one before
    run = _Run(student, plan)
    outcome = Outcome({}, unseen.kl_base, kl_start, kl_start, 0, 0.0)
    best = student.state()
    before = 0.0
    kept = saved.of(key) if saved is not None else None
    if kept is not None and run.take_up(kept):
        outcome.resumed = True
        before, outcome.steps = kept["seconds"], kept["steps"]
        outcome.kl_best, best = kept["kl_best"], kept["best"]
        outcome.curve = kept["curve"]
    if not outcome.curve:
        outcome.curve.append((0.0, outcome.recovered_at_start))
    rows = plan.rows or rows_within(until, unseen.rows / max(unseen.seconds, 1e-9))
    n_parts = -(-rows // _AT_ONCE)
    beside = max(1, int(_ANCHOR_ROWS * rows))
    packs = lessons.packs(rows // n_parts)
    anchors, own = [lessons.returns(beside), lessons.neutral(beside)], lessons.examples(beside)
    between = max(plan.seconds / _CHECKS, _APART * unseen.seconds)
    loss, check = math.nan, before + between

    def spent() -> float:
        return before + time.perf_counter() - started

    def measure() -> None:
        nonlocal best
        now = student.state()
        student.restore(run.average)
        kl = unseen.of(student)
        if kl < outcome.kl_best:
            outcome.kl_best, best = kl, student.state()
        student.restore(now)
        recovered = 1 - kl / unseen.kl_base if unseen.kl_base > 0 else 0.0
        outcome.curve.append((spent(), recovered))

    stepping = 0.0  # seconds of the last step
    try:
        while outcome.steps == 0 or spent() + stepping < until:
            mark, extra = spent(), None
            share = mark / max(until, 1e-9)
            parts = [next(packs) for _ in range(n_parts)]
            if outcome.steps % 4 == 3:  # nothing can be harmed before the first step
                extra = next(anchors[(outcome.steps // 4) % 2])
            found = run.step(parts, extra, next(own, None), share)
            stepping = spent() - mark
            loss = found if math.isnan(loss) else 0.9 * loss + 0.1 * found
            outcome.steps += 1
            if spent() >= check:
                measure()
                check = spent() + between
                if checkpoint is not None:
                    run.save(checkpoint, key, outcome, best, spent())
            told(spent(), plan.seconds, loss, outcome.curve[-1][1])
        measure()
    except KeyboardInterrupt:
        outcome.interrupted = True
        if checkpoint is not None:
            run.save(checkpoint, key, outcome, best, spent())
    student.restore(best)
    outcome.changes = student.changes()
    outcome.seconds = spent()
    return outcome


def rows_within(seconds: float, measured: float) -> int:
    """A step's rows, where `measured` of them are read a second when it is measured.

    Time for more rows is spent on larger steps and on more of them alike. Few large ones learn
    less: a slow machine has one step of 2,048 rows in a minute, or a dozen that reach further.
    """
    total = seconds * measured / _DEARER
    return min(max(int((total * _PER_STEP) ** 0.5), _ROWS[0]), _ROWS[1])


class _Run:
    """Adam's state and the moving average of the weights."""

    def __init__(self, student: Student, plan: Plan) -> None:
        self.student, self.plan = student, plan
        self.average = student.state()
        self.optimizer = torch.optim.Adam(student.parameters(), lr=plan.rate, betas=_BETAS)
        self._taken = 0

    def step(
        self,
        lessons: list[Lesson],
        extra: Lesson | None,
        own: Lesson | None,
        share: float,
    ) -> float:
        """One step of the schedule at this share of the budget; returns the lessons' mean loss."""
        warm = min(1.0, (self._taken + 1) / _WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1, share)))
        self.optimizer.zero_grad()
        losses = [self._backward(lesson, 1 / len(lessons)) for lesson in lessons]
        if extra is not None:
            self._backward(extra, _ANCHOR_WEIGHT)
        if own is not None:
            self._backward(own, _OWN_WEIGHT)
        self.optimizer.step()
        self.student.keep_slot()
        self._taken += 1
        decay = min(self.plan.average, 1 - 1 / (self._taken + 1))
        with torch.no_grad():
            for place, pair in self.student.pairs.items():
                for mean, now in zip(self.average[place], pair, strict=True):
                    mean.lerp_(now, 1 - decay)
        return sum(losses)

    def _backward(self, lesson: Lesson, weight: float) -> float:
        pack, wanted = lesson
        with torch.enable_grad():
            streams = self.student.forward(pack)
            loss = Divergence.apply(streams, wanted, pack.reply_weight * weight, self.student.base)
            loss.backward()
        return float(loss.detach())

    def save(
        self,
        path: Path,
        key: str,
        outcome: Outcome,
        best: dict[tuple[int, str], Pair],
        seconds: float,
    ) -> None:
        """Write everything that a later run needs, atomically."""
        state = {
            "key": key,
            "references": self.plan.references,
            "fitted": self.plan.fitted,
            "last": self.plan.last,
            "seconds": seconds,
            "steps": outcome.steps,
            "taken": self._taken,
            "kl_best": outcome.kl_best,
            "curve": outcome.curve,
            "best": best,
            "average": self.average,
            "pairs": self.student.state(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_checkpoint(path, self.plan.origin, state)

    def take_up(self, kept: dict[str, Any]) -> bool:
        """Go on from a saved state; False, and nothing changed but the optimizer, if damaged."""
        try:
            self.optimizer.load_state_dict(kept["optimizer"])
            self.student.restore(kept["pairs"])
            self.average, self._taken = kept["average"], kept["taken"]
        except (RuntimeError, ValueError, KeyError, TypeError):
            return False
        return True

"""More references within a time budget, and a closed form fitted anew to them.

Knows what a budget bears, and which settings so many references ask for. Does not know
training, nor what is kept of the outcome.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from superego.base import BaseModel
from superego.converters.checkpoint import Origin
from superego.converters.closed_form import solve
from superego.converters.compile import Opened, Settings, fit_seconds, writing_seconds
from superego.converters.products import probe_dtype
from superego.converters.references import BLOCKS, Prompts, write_replies
from superego.converters.shape import Shape, read_shape
from superego.converters.streams import Conversation
from superego.converters.transformer import Base
from superego.progress import Steps

if TYPE_CHECKING:
    from llama_cpp import Llama

_SHARE = 0.92  # of the budget, at least, for the references and a fit to them
_LONG_SHARE, _BEHIND = 0.98, 6.0  # of a long one; seconds of what comes behind it: measure, write
_MORE = 1.25  # times the references that the file was fitted to; fewer are not fitted again
_ROWS = 54  # tokens of a reference, about
_EACH = 0.01  # seconds that one takes beside all products, at least
_BESIDE = 10.0  # seconds that a fit takes however few they are
_MEASURED = 60  # references whose whole fit takes as long as what is measured around it
_MISJUDGED = 1.3  # times as fast as the probe says, at most
_TELLING = 90  # references that must have been written for their time to tell a pace
_KEPT_HEAP = 0.93  # of what a fit of a compile takes: memory stays in the process (heap.py)
# A machine that the probe misjudged writes and fits at another pace; one whose memory is busy with
# other programs writes slower, and fits as before. So a fit is off by what writing is off by, to
# the power of:
_PACE_EXPONENT = 0.5
_PACE = 2.0  # times faster or slower than estimated, at most: of a tiny base products tell little
_FIRST_LAYERS = 3  # from which on a fit's layers tell its pace
_RECALL = 0.8  # of what layers before tell of it, a layer
# times what is left, that it may then be expected to take: in the end, and more with all layers to
# come, as a machine that was slow for a while may not stay so
_LATE, _EARLY = 1.03, 0.08
_FEWEST = 32  # references that are worth being written by themselves


@dataclass(frozen=True)
class Allowance:
    """How many references may be written."""

    least: int  # blocks, whatever they take
    most: int
    seconds: float  # for what is more than the least
    fitted: bool  # a fit to them takes its part of the seconds
    unseen: int  # of them that are not fitted


def fitting_seconds(budget: float) -> float:
    """Seconds of a budget for the references and a fit to them: what is behind does not grow."""
    return max(_SHARE * budget, _LONG_SHARE * budget - _BEHIND)


def blocks_within(model: BaseModel, budget: float) -> int:
    """How many blocks of references may be written and fitted in so many seconds, at most."""
    shape, rate = read_shape(model.header), probe_dtype()[1]
    each = writing_seconds(shape, _ROWS, rate) + _fit_each(shape, _ROWS, rate, _KEPT_HEAP)
    most = _MISJUDGED * fitting_seconds(budget) / each
    return sum(
        end - size < most for size, end in zip(BLOCKS, itertools.accumulate(BLOCKS), strict=True)
    )


def fitted_within(shape: Shape, rows: float, rate: float, seconds: float, pace: float) -> int:
    """How many references of so many rows a fit has time for, at `pace` times what is estimated."""
    return max(0, int((seconds - _BESIDE) / _fit_each(shape, rows, rate, pace)) - _MEASURED)


def _fit_each(shape: Shape, rows: float, rate: float, pace: float) -> float:
    """Seconds of a fit for each reference."""
    return pace * fit_seconds(shape, 1, rate) * rows + _EACH


def write_within(
    llm: Llama,
    opened: Opened,
    model: BaseModel,
    prompts: Prompts,
    allowed: Allowance,
    before: Sequence[Conversation],
    use_cache: bool,
    steps: Steps,
) -> tuple[list[Conversation], int]:
    """As many references as are allowed, block after block; those of `before` are there already.

    Returns them, and how many a fit has time for in what is left.

    What a block took tells what the next one and the fit will, better than a probe of a fraction
    of a second; where none was written yet there is only that. Where a fit shares the time, as many
    are written as it has time for behind that, and the last block need not be whole.
    """
    shape, rate = opened.base.shape, opened.rate
    started = time.perf_counter()
    blocks = allowed.least
    found: Sequence[Conversation] = before
    asked = prompts
    pace = 1.0  # seconds that writing took, as a share of what the probe lets expect
    while True:
        mark, there = time.perf_counter(), len(found)
        found, cached = write_replies(
            llm,
            opened.base,
            model.fingerprint,
            asked,
            blocks,
            use_cache,
            lambda done, total: steps.update("writing references", done, total),
            opened.sizes.room,
            found,
        )
        rows = sum(len(c.prompt) + len(c.reply) - 1 for c in found) / len(found)
        written = len(found) - cached - there
        if written >= _TELLING:
            took = time.perf_counter() - mark
            pace = took / writing_seconds(shape, round(rows * written), rate)
        left = allowed.seconds - (time.perf_counter() - started)
        fit_pace = _KEPT_HEAP * min(max(pace, 1 / _PACE), _PACE) ** _PACE_EXPONENT
        fits = fitted_within(shape, rows, rate, left, fit_pace)
        if blocks >= allowed.most or len(asked.rest) < len(prompts.rest):
            return found, fits
        size = BLOCKS[blocks]
        each = pace * writing_seconds(shape, round(rows * size), rate) / size
        if allowed.fitted:
            lacking = fits - (len(found) - allowed.unseen)
            more = int(lacking / (1 + each / _fit_each(shape, rows, rate, fit_pace)))
        else:
            more = size if size * each <= left else 0
        if more < min(_FEWEST, size):
            return found, fits
        if more < size:
            asked = replace(prompts, rest=prompts.rest[: len(found) + more])
        blocks += 1


def least(before: int) -> int:
    """How many references are enough more than there were before to be worth a fit; some."""
    return max(1, math.ceil(_MORE * before))


def settings_for(before: dict[str, Any], n: int, base: Base) -> dict[str, Any]:
    """The settings of a fit to n references, of a rank no less than there was."""
    known = Settings.for_references(n)
    had = before.get("rank", 0)
    rank = min(max(known.rank, had if type(had) is int else 0), base.shape.d_model)
    return {"rank": rank, "ridge": known.ridge, "ridge_ffn": known.ridge_ffn, "most": n}


@dataclass(frozen=True)
class Fitted:
    """A closed form fitted anew, and by which settings."""

    origin: Origin
    references: int  # that its first layers were fitted to
    last: int  # and its last ones, no more
    settings: dict[str, Any]


class _TooFew(Exception):
    """A fit's first layers tell that it would have fewer references than it is worth."""


def fit_again(
    opened: Opened,
    prompts: Prompts,
    seen: Sequence[Conversation],
    before: dict[str, Any],
    until: float,
    steps: Steps,
    least: int,
) -> Fitted | None:
    """The closed form of all references that are there now, or of as many as there is time for.

    What writing took tells a fit's pace within a quarter. Its own layers tell it better: where it
    would not be done `until` then, by time.perf_counter, the layers to come are fitted to fewer.
    None where that would be fewer than `least`. `before` are the settings that the start was made
    with.
    """
    if len(seen) < least:
        return None
    settings = settings_for(before, len(seen), opened.base)
    pace = _Pace(until, opened.base.shape.n_layer, least)
    try:
        changes = solve(
            opened.base,
            seen,
            prompts.prefixes,
            settings["rank"],
            {"attn_output": settings["ridge"], "ffn_down": settings["ridge_ffn"]},
            lambda done, total: steps.update("solving layers", done, total),
            opened.slots,
            bear=pace.bear,
        )
    except _TooFew:
        return None
    slot = opened.slots.of(opened.base, [c.prompt for c in seen], prompts.prefixes)
    return Fitted((changes, slot), len(seen), pace.last or len(seen), settings)


class _Pace:
    """How many references the layers to come may be fitted to, by what those done took."""

    def __init__(self, until: float, n_layer: int, least: int) -> None:
        self._until, self._n_layer, self._least = until, n_layer, least
        self._then = 0.0  # the end of the layer before
        self._took = self._walked = 0.0  # seconds, and conversations, of late
        self.last = 0

    def bear(self, done: int, n: int) -> int:
        """See `closed_form.solve`."""
        self.last, now = n, time.perf_counter()
        if done > 1:  # in front of the first layer the slot was looked for
            self._took = _RECALL * self._took + now - self._then
            self._walked = _RECALL * self._walked + n
        self._then = now
        if done <= _FIRST_LAYERS:
            return n
        each, left = self._took / self._walked, max(self._until - now, 0.0)
        to_come = self._n_layer - done
        late = _LATE + _EARLY * to_come / self._n_layer
        if each * n * to_come <= late * left:
            return n
        self.last = int(late / _LATE * left / (each * to_come))
        if self.last < self._least:
            if done == 1 + _FIRST_LAYERS:
                raise _TooFew
            self.last = min(n, self._least)  # a fit that nearly is done is not thrown away
        return self.last

"""Calibration: the scale at which an adapter recovers most, within an off-target limit.

Knows scales and their measures. Does not know how an adapter was made. Measured in
llama.cpp on messages that are neither the fit's references nor held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superego.adapter import Adapter
from superego.atomic import check_writable
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import drift
from superego.exchanges import unused_prompts
from superego.history import manifesto_of, with_entry
from superego.pairs import copy_adapter
from superego.replay import Variant, divergences, replies
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

SCALES = (0.4, 0.6, 0.8, 1.0, 1.2)
_STEP = 0.1  # of the second round, on either side of the first one's best
_PROMPTS, _TOKENS = 16, 24
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """One scale: KL recovered on unused messages, and KL(0‖S) on neutral text."""

    scale: float
    recovered: float
    drift: float


def choose(points: Sequence[Point], limit: float) -> Point:
    """The point that recovers most among those within the limit.

    Raises SuperegoError where none is within it, saying what the least drift is.
    """
    within = [p for p in points if p.drift <= limit]
    if not within:
        least = min(points, key=lambda p: p.drift)
        raise SuperegoError(
            f"no scale from {min(p.scale for p in points):g} to "
            f"{max(p.scale for p in points):g} has a drift within {limit:g}; the least is "
            f"{least.drift:.4f} at scale {least.scale:g}: give a larger --limit"
        )
    return max(within, key=lambda p: (p.recovered, -p.scale))


def calibrate(
    adapter: Adapter,
    model: BaseModel,
    output: Path,
    limit: float | None = None,
    n_prompts: int = _PROMPTS,
    threads: int | None = None,
    by: str | None = None,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """Find the scale, and write the adapter so that scale 1 means it from now on.

    `limit` is the most KL(0‖S) on neutral text, nats; None takes the system message's own
    KL(0‖T) there. The scale goes into alpha, which every runtime applies, and into
    `superego.calibration.*`. `output` may be the adapter's own file. Returns the points
    measured. Raises SuperegoError for an adapter without a manifesto, or a limit that no
    scale keeps.
    """
    check_writable(output)
    manifesto = manifesto_of(adapter)
    llm = load(model, n_ctx=256, threads=threads)
    template = ChatTemplate(model.header)
    messages = unused_prompts(llm, model.header, [adapter], n_prompts)
    teacher = encode(llm, template, manifesto.body, messages)
    student = encode(llm, template, None, messages)
    progress("the system message's replies", 0, 1)
    front = Variant(teacher.prefix, (0.0,))
    said = replies(llm, front, [adapter], teacher.rest, _TOKENS, stop_tokens(llm))
    progress("the system message's replies", 1, 1)
    exchanges = list(zip(teacher.rest, said, strict=True))

    def measure(scales: Sequence[float], label: str) -> tuple[list[Point], float]:
        kls = divergences(
            llm,
            front,
            [Variant(student.prefix, (s,)) for s in (0.0, *scales)],
            [adapter],
            exchanges,
            lambda done, total: progress(label, done, total),
        ).mean(axis=1)
        system, *drifts = drift(llm, model, teacher, adapter, scales)
        recovered = 1 - kls[1:] / max(float(kls[0]), 1e-9)
        return [
            Point(s, float(r), d) for s, r, d in zip(scales, recovered, drifts, strict=True)
        ], system

    points, system = measure(SCALES, "measuring scales")
    bound = system if limit is None else limit
    best = choose(points, bound)
    near = [round(best.scale + step, 2) for step in (-_STEP, _STEP)]
    points += measure([s for s in near if s > 0], "measuring near the best")[0]
    best = choose(points, bound)
    one = next(p for p in points if p.scale == 1.0)
    before = adapter.own.get("calibration.scale", 1.0)
    copy_adapter(
        adapter,
        output,
        {
            "superego.calibration.scale": float(before) * best.scale,
            "superego.calibration.recovered": best.recovered,
            "superego.calibration.drift": best.drift,
            "superego.calibration.limit": float(bound),
            "superego.history": with_entry(
                adapter, "calibrate", by, scale=best.scale, drift=round(best.drift, 5)
            ),
        },
        strength=best.scale,
    )
    points.sort(key=lambda p: p.scale)
    return {
        "adapter": str(output),
        "scale": best.scale,
        "KL recovered": round(best.recovered, 4),
        "KL recovered at scale 1 before": round(one.recovered, 4),
        "drift": round(best.drift, 4),
        "drift at scale 1 before": round(one.drift, 4),
        "limit": round(float(bound), 4),
        "system message's drift": round(system, 4),
        "prompts": len(messages),
        "points": [
            {"scale": p.scale, "KL recovered": round(p.recovered, 4), "drift": round(p.drift, 4)}
            for p in points
        ],
    }

"""Calibration: the scale at which an adapter recovers most, within an off-target limit.

Knows scales and their measures. Does not know how an adapter was made. Measured in
llama.cpp on messages that are neither the fit's references nor held-out prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from superego.adapter import Adapter
from superego.atomic import check_writable
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import Drift
from superego.exchanges import unused_prompts
from superego.gguf_file import check_unchanged
from superego.history import manifesto_of, with_entry
from superego.pairs import copy_adapter
from superego.replay import Variant, divergences, replies
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

SCALES = tuple(round(0.1 * n, 1) for n in range(4, 13))
_PROMPTS, _TOKENS = 16, 24
Progress = Callable[[str, int, int], None]


def choose(
    recovered: Mapping[float, float], drift: Callable[[float], float], limit: float
) -> float:
    """The scale that recovers most among those whose drift is within the limit.

    Of equals the weaker. A stronger adapter drifts more, so nothing beyond a scale that is over
    the limit is tried: `drift` costs time. Raises SuperegoError where no scale is within it.
    """
    over = math.inf
    for scale in sorted(recovered, key=lambda s: (-recovered[s], s)):
        if scale < over:
            if drift(scale) <= limit:
                return scale
            over = scale
    raise SuperegoError(
        f"no scale from {min(recovered):g} to {max(recovered):g} has a drift within {limit:g}; "
        f"the least is {drift(min(recovered)):.4f} at scale {min(recovered):g}: give a larger "
        "--limit"
    )


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
    KL(0‖T) there. The scale goes into the matrices, which every runtime applies, and into
    `superego.calibration.*`. A slot keeps its strength (pairs.py). `output` may be the
    adapter's own file. Returns the points measured. Raises SuperegoError for an adapter without
    a manifesto, or a limit that no scale keeps.
    """
    check_writable(output, *model.files)
    before = adapter.number("calibration.scale", 1.0)
    manifesto = manifesto_of(adapter)
    llm = load(model, n_ctx=256, threads=threads)
    template = ChatTemplate(model.header)
    messages = unused_prompts(llm, model.header, [adapter], n_prompts)
    teacher = encode(llm, template, manifesto.body, messages)
    student = encode(llm, template, None, messages)
    progress("the system message's replies", 0, 1)
    adapters = [adapter]
    front = Variant(teacher.prefix, (0.0,))
    said = replies(llm, front, adapters, teacher.rest, _TOKENS, stop_tokens(llm))
    progress("the system message's replies", 1, 1)
    kls = divergences(
        llm,
        front,
        [Variant(student.prefix, (scale,)) for scale in (0.0, *SCALES)],
        adapters,
        list(zip(teacher.rest, said, strict=True)),
        lambda done, total: progress("measuring scales", done, total),
    ).mean(axis=1)
    rates = map(float, 1 - kls[1:] / max(float(kls[0]), 1e-9))
    recovered = dict(zip(SCALES, rates, strict=True))
    drifts: dict[float, float] = {}
    with Drift(llm, model, [(adapter, 0.0)]) as neutral:

        def drift(scale: float) -> float:
            if scale not in drifts:
                progress("measuring drift", len(drifts), len(SCALES))
                drifts[scale] = neutral.of([scale])
            return drifts[scale]

        system = neutral.of_system(teacher)
        bound = system if limit is None else limit
        best = choose(recovered, drift, bound)
        drift(1.0)
    check_unchanged(model.header)
    copy_adapter(
        adapter,
        output,
        {
            "superego.calibration.scale": before * best,
            "superego.calibration.recovered": recovered[best],
            "superego.calibration.drift": drifts[best],
            "superego.calibration.limit": float(bound),
            "superego.history": with_entry(
                adapter, "calibrate", by, scale=best, drift=round(drifts[best], 5)
            ),
        },
        strength=best,
    )
    return {
        "adapter": str(output),
        "scale": best,
        "KL recovered": round(recovered[best], 4),
        "KL recovered at scale 1 before": round(recovered[1.0], 4),
        "drift": round(drifts[best], 4),
        "drift at scale 1 before": round(drifts[1.0], 4),
        "limit": round(float(bound), 4),
        "system message's drift": round(system, 4),
        "prompts": len(messages),
        "points": [
            {
                "scale": s,
                "KL recovered": round(recovered[s], 4),
                "drift": round(drifts[s], 4) if s in drifts else None,
            }
            for s in SCALES
        ],
    }

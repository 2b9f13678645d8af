"""Vector: a manifesto becomes a control vector, layer by layer what the streams lack on average.

Knows means of residual streams and the tuning of one scale. Does not know the file format.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from superego.atomic import check_writable
from superego.base import BaseModel
from superego.control_vector import write_vector
from superego.converters.compile import Settings, open_for_compile
from superego.converters.metadata import Metadata, described
from superego.converters.references import prepare, seeds, write_replies
from superego.converters.shape import read_shape
from superego.converters.streams import (
    Conversation,
    Pack,
    Prefixes,
    Streams,
    mean_kl,
    predictions,
)
from superego.converters.transformer import Base
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.runtime import default_threads, load, peak_memory

METHOD = "control-vector"
# Of what is lacking, how much a direction holds before later layers are walked. All of it (1) makes
# later layers mend what the same vector at every token did to single ones; nothing fed back (0)
# counts what one layer lacks again in all behind it. docs/vectors.md has the figures.
_SHARE = 0.4
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
Directions = dict[int, torch.Tensor]  # layer -> (d_model,) float32
Told = Callable[[int, int], None]


def mean_differences(
    base: Base,
    conversations: Sequence[Conversation],
    prefixes: Prefixes,
    told: Told = lambda done, total: None,
) -> Directions:
    """Behind every layer but the first: teacher's stream minus student's, mean over replies.

    A share of it is the layer's direction, which is added to the student, at every row, before
    the next layer is walked, as llama.cpp adds it: so the next one is a share of what those
    before left. Rows are those that predict reply tokens, every reply counts alike.
    """
    packs = [Pack(conversations, prefix) for prefix in (prefixes.teacher, prefixes.student)]
    weight = packs[0].reply_weight[:, None]
    teacher, student = (Streams(base, pack) for pack in packs)
    found: Directions = {}
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        for streams in (teacher, student):
            streams.through(layer)
        if index:  # llama.cpp has no direction behind layer 0
            lacking = (teacher.rows - student.rows)[packs[0].predicts]
            found[index] = _SHARE * (lacking * weight).sum(0)
            _steer(student, found[index])
        told(index + 1, base.shape.n_layer)
    return found


def steered(base: Base, pack: Pack, directions: Directions, scale: float) -> torch.Tensor:
    """As `predictions`, with directions added: the last streams (n, d_model) before replies."""
    streams = Streams(base, pack)
    for index in range(base.shape.n_layer):
        streams.through(base.layer(index))
        if index in directions:
            _steer(streams, directions[index] * scale)
    return streams.rows[pack.predicts]


def _steer(streams: Streams, direction: torch.Tensor) -> None:
    streams.rows += direction
    streams.prefix += direction


def make_vector(
    manifesto: Manifesto,
    model: BaseModel,
    output: Path,
    settings: Settings,
    scale: float | None = None,
    threads: int | None = None,
    use_cache: bool = True,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Write a control vector for `model` to `output`; returns what was done and what it cost.

    References and their cache are compile's. Without `scale` it is the one of SCALES that recovers
    most on references that the means have not seen; it goes into the directions, so that scale 1
    means it from then on. Raises SuperegoError for a base or manifesto that cannot be used,
    before any work, and where no scale recovers anything.
    """
    steps = steps or Steps(quiet=True)
    started = time.perf_counter()
    check_writable(output, *model.files)
    read_shape(model.header)
    torch.set_num_threads(threads or default_threads())
    torch.set_grad_enabled(False)
    llm = load(model, threads=threads, vocab_only=True)
    prompts = prepare(llm, model, manifesto, seeds(settings.seed)[: settings.messages])
    base = open_for_compile(model, llm, steps).base
    seconds = {"load": time.perf_counter() - started}

    mark = time.perf_counter()
    conversations, cached = write_replies(
        llm,
        base,
        model.fingerprint,
        prompts,
        settings.blocks,
        use_cache,
        lambda done, total: steps.update("writing references", done, total),
    )
    seconds["references"] = time.perf_counter() - mark

    mark = time.perf_counter()
    unseen, seen = conversations[-settings.unseen :], conversations[: -settings.unseen]
    directions = mean_differences(
        base,
        seen,
        prompts.prefixes,
        lambda done, total: steps.update("walking layers", done, total),
    )
    seconds["means"] = time.perf_counter() - mark

    mark = time.perf_counter()
    front, own = (Pack(unseen, p) for p in (prompts.prefixes.teacher, prompts.prefixes.student))
    target = predictions(base, front)
    kl_base = mean_kl(base, own, target, predictions(base, own))
    tried = (scale,) if scale is not None else SCALES
    recovered: dict[float, float] = {}
    for done, each in enumerate(tried):
        steps.update("tuning the scale on unseen references", done, len(tried))
        kl = mean_kl(base, own, target, steered(base, own, directions, each))
        recovered[each] = 1 - kl / kl_base if kl_base > 0 else 0.0
    steps.update("tuning the scale on unseen references", len(tried), len(tried))
    best = max(recovered, key=lambda each: (recovered[each], -each))
    if scale is None and recovered[best] <= 0:
        raise SuperegoError(
            f"no scale from {min(tried):g} to {max(tried):g} brings the base nearer to the "
            f"manifesto (the best, {best:g}, recovers {recovered[best]:.3f}); compile it instead, "
            "or give --scale"
        )
    seconds["tuning"] = time.perf_counter() - mark
    seconds["total"] = time.perf_counter() - started

    own_keys: Metadata = {
        "superego.settings": json.dumps(
            {"effort": settings.effort, "seed": settings.seed, "unseen": settings.unseen}
        ),
        "superego.vector.scale": float(best),
        "superego.kl_recovered": recovered[best],
    }
    check_unchanged(model.header)
    write_vector(
        output,
        model.architecture,
        {layer: (direction * best).numpy() for layer, direction in directions.items()},
        described(manifesto, model, METHOD, own_keys),
    )
    return {
        "vector": str(output),
        "bytes": output.stat().st_size,
        "manifesto": manifesto.name,
        "effort": settings.effort,
        "layers": len(directions),
        "references": len(conversations),
        "references from cache": cached,
        "scale": best,
        "kl recovered on unseen references": round(recovered[best], 4),
        "kl recovered by scale": {f"{s:g}": round(r, 3) for s, r in recovered.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak memory MB": peak_memory() // 2**20,
    }

"""Moving an adapter to an updated or re-quantized base: reused if still good, else recompiled.

Knows when an adapter still fits. Does not know why the base changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from superego.adapter import Adapter, mismatches, read_adapter
from superego.atomic import check_writable, temporary_folder
from superego.base import BaseModel
from superego.converters.amend import known_replies, settings_of
from superego.converters.compile import compile_manifesto
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.exchanges import kept_references
from superego.gguf_file import check_unchanged
from superego.history import manifesto_of, with_entry
from superego.pairs import copy_adapter
from superego.progress import Steps
from superego.replay import Variant, divergences
from superego.runtime import load
from superego.template import ChatTemplate

MARGIN = 0.05  # of KL recovered, below what the file says


def still_recovers(
    adapter: Adapter, model: BaseModel, threads: int | None, steps: Steps
) -> float | None:
    """KL recovered on this base, in llama.cpp, on the references that the fit did not see.

    At the strength the file's own figure is for: a calibration is undone. None where the
    adapter keeps no references for this vocabulary.
    """
    exchanges = kept_references(adapter, model.header)
    n = adapter.own.get("references.unseen", 0)
    if not exchanges or not isinstance(n, int) or not 0 < n <= len(exchanges):
        return None
    unseen = exchanges[-n:]
    llm = load(model, n_ctx=256, threads=threads)
    template = ChatTemplate(model.header)
    fronts = [encode(llm, template, s, []).prefix for s in (manifesto_of(adapter).body, None)]
    with temporary_folder() as folder:
        scale = adapter.number("calibration.scale", 1.0)
        if scale <= 0:
            raise SuperegoError(f"{adapter.path}: superego.calibration.scale is {scale:g}")
        if scale != 1:
            whole = folder / "whole.gguf"
            copy_adapter(adapter, whole, {}, strength=1 / scale)
            adapter = read_adapter(whole)
        kls = divergences(
            llm,
            Variant(fronts[0], (0.0,)),
            [Variant(fronts[1], (0.0,)), Variant(fronts[1], (1.0,))],
            [adapter],
            unseen,
            lambda done, total: steps.update("measuring on the new base", done, total),
        ).mean(axis=1)
    return 1 - float(kls[1] / max(kls[0], 1e-9))


def move(
    adapter: Adapter,
    model: BaseModel,
    output: Path,
    margin: float = MARGIN,
    effort: str | None = None,
    by: str | None = None,
    threads: int | None = None,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Write an adapter for `model` with the same identity; returns what was done and why.

    Where every tensor fits and the adapter recovers, on unseen references, what its file says
    less `margin` at most, its matrices are taken over. Else its manifesto is compiled for the
    new base, from the references that still hold there. Raises SuperegoError where the adapter
    has no manifesto.
    """
    steps = steps or Steps(quiet=True)
    check_writable(output, *model.files)
    manifesto = manifesto_of(adapter)
    said = adapter.number("kl_recovered", 1.0)
    report: dict[str, Any] = {"adapter": str(output), "KL recovered, as the file says": said}
    different = mismatches(adapter, model.header)
    found = None if different else still_recovers(adapter, model, threads, steps)
    if found is not None:
        report["KL recovered on the new base"] = round(found, 4)
    if found is not None and found >= said - margin:
        history = with_entry(adapter, "move", by, to=model.name, how="reused", recovered=found)
        check_unchanged(model.header)
        copy_adapter(
            adapter,
            output,
            {
                "general.base_model.0.name": model.name,
                "superego.base.fingerprint": model.fingerprint,
                "superego.kl_recovered": found,
                "superego.history": history,
            },
        )
        return {**report, "done": "reused", "why": f"within {margin:g} of what the file says"}
    if different:
        why = "another model: " + different[0]
    elif found is None:
        why = "the adapter keeps no references to measure it on"
    else:
        why = f"more than {margin:g} below what the file says"
    history = with_entry(adapter, "move", by, to=model.name, how="recompiled", why=why)
    compiled = compile_manifesto(
        manifesto,
        model,
        output,
        settings_of(adapter, effort),
        threads=threads,
        steps=steps,
        known=known_replies(adapter, model.header),
        extra={"superego.history": history},
    )
    return {**report, "done": "recompiled", "why": why, **compiled}

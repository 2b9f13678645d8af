"""Blends: several adapters as one, by exact concatenation, with an optional rank cut.

Knows low-rank algebra. Does not know manifestos or models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import superego
from superego.adapter import Adapter, write_adapter
from superego.atomic import check_writable
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.history import with_entry
from superego.pairs import check_marks, net_scales, read_pairs, slot_marks, slot_ranks, slot_scales

METHOD = "blend"


def blend(
    parts: Sequence[tuple[Adapter, float]],
    output: Path,
    rank: int | None = None,
    by: str | None = None,
) -> dict[str, Any]:
    """Write one adapter that does what these do together, each at its scale.

    A matrix's change is Σ scale·B A: the A stacked, the scaled B side by side, which is exact
    but for the rounding of F16. Slots act in shares that are one together
    (pairs.py); one file given twice is there once, with the sum of its scales. With
    `rank`, the best change of that rank (by singular values) in its place. Returns what was
    written, with the cut's error ‖ΔW − ΔW'‖/‖ΔW‖ over all matrices and of the worst one.
    Raises SuperegoError for adapters of different bases.
    """
    check_writable(output)
    check_same_base([adapter for adapter, _ in parts])
    stacked: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    slots = [slot_ranks(adapter) for adapter, _ in parts]
    files = [(adapter.path.resolve(), adapter.header.modified) for adapter, _ in parts]
    scales = net_scales(files, [scale for _, scale in parts])
    # of a part that has no share of the slot, no other mark is in the way
    with_share = [adapter for (adapter, _), scale in zip(parts, scales, strict=True) if scale > 0]
    check_marks([(str(adapter.path), slot_marks(adapter)) for adapter in with_share])
    added = slot_scales(scales, [bool(slot) for slot in slots])
    for i, ((adapter, _), slot) in enumerate(zip(parts, slots, strict=True)):
        if not scales[i] and files.count(files[i]) > 1:
            continue  # added up at another place, or opposite
        for name, (a, b) in read_pairs(adapter).items():
            ranks = slot.get(name, np.zeros(len(a), bool))
            factor = np.where(ranks, scales[i] + added[i], scales[i]).astype(np.float32)
            kept = factor != 0  # a neuron replaced by nothing would hide that there is a slot
            if kept.any():
                stacked.setdefault(name, []).append((a[kept], (b * factor)[:, kept]))
    if not stacked:
        raise SuperegoError(f"{parts[0][0].path}: its scales add up to 0; nothing would be left")
    pairs, lost, whole, worst = {}, 0.0, 0.0, 0.0
    for name, found in sorted(stacked.items()):
        a = np.concatenate([a for a, _ in found])
        b = np.concatenate([b for _, b in found], axis=1)
        if rank is not None and rank < len(a):
            a, b, gone, size = cut(a, b, rank)
            lost, whole = lost + gone, whole + size
            worst = max(worst, (gone / size) ** 0.5 if size else 0.0)
        pairs[name] = a, b
    described = [
        {
            "name": adapter.name,
            "scale": scale,
            "file.sha256": hashlib.sha256(adapter.path.read_bytes()).hexdigest(),
            "manifesto.sha256": adapter.own.get("manifesto.sha256", ""),
        }
        for adapter, scale in parts
    ]
    check_unchanged(*(adapter.header for adapter, _ in parts))
    names = [f"{adapter.name} × {scale:g}" for adapter, scale in parts]
    metadata: dict[str, str | int | float] = {
        "general.name": " + ".join(f"{a.name}:{scale:g}" for a, scale in parts),
        "superego.version": superego.__version__,
        "superego.method": METHOD,
        "superego.blend": json.dumps(described, ensure_ascii=False),
        "superego.history": with_entry(None, "blend", by, of=" and ".join(names)),
    }
    prints = [a.own.get("base.fingerprint") for a, _ in parts]
    made_from = next((f for f in prints if f and isinstance(f, str)), None)
    if made_from is not None:
        metadata["superego.base.fingerprint"] = made_from
    error = (lost / whole) ** 0.5 if whole else 0.0
    if rank is not None:
        metadata["superego.blend.rank_error"] = error
    write_adapter(output, parts[0][0].header.text("general.architecture"), pairs, metadata)
    return {
        "adapter": str(output),
        "bytes": output.stat().st_size,
        "parts": names,
        "matrices": len(pairs),
        "rank": max(len(a) for a, _ in pairs.values()),
        "rank cut error": round(error, 5),
        "worst matrix error": round(worst, 5),
    }


def cut(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The nearest change of at most `rank` to B A, A (r, in) and B (out, r).

    Returns A (rank, in), B (out, rank), and the squared Frobenius norms of what is lost and of
    the whole. The singular values are those of the (r, r) core between two QR factors.
    """
    left, core_b = np.linalg.qr(b.astype(np.float64))
    right, core_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, v = np.linalg.svd(core_b @ core_a.T)
    root = np.sqrt(s[:rank])  # shared by both sides: neither overflows F16
    new_b = (left @ u[:, :rank]) * root
    new_a = (v[:rank] * root[:, None]) @ right.T
    return (
        new_a.astype(np.float32),
        new_b.astype(np.float32),
        float((s[rank:] ** 2).sum()),
        float((s**2).sum()),
    )


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise SuperegoError where these adapters cannot have been made for one base."""
    first = adapters[0]
    for other in adapters[1:]:
        kinds = [a.header.text("general.architecture") for a in (first, other)]
        if kinds[0] != kinds[1]:
            raise SuperegoError(
                f"{first.path} is for architecture '{kinds[0]}', {other.path} for '{kinds[1]}': "
                "adapters of different bases cannot be blended"
            )
        for name in sorted(first.pairs.keys() & other.pairs.keys()):
            shapes = [
                (a.pairs[name][1].shape[0], a.pairs[name][0].shape[1]) for a in (first, other)
            ]
            if shapes[0] != shapes[1]:
                raise SuperegoError(
                    f"{name} is {shapes[0]} in {first.path} and {shapes[1]} in {other.path}: "
                    "adapters of different bases cannot be blended"
                )
        prints = [a.own.get("base.fingerprint") for a in (first, other)]
        if None not in prints and prints[0] != prints[1]:
            raise SuperegoError(
                f"{first.path} and {other.path} were made from different base files; move one "
                f"to the other's base first: superego move {other.path} --base BASE -o OUT.gguf"
            )

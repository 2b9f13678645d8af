"""Merge: an adapter folded into the weights of its base, quantized again as the base was.

Knows which tensors change, to which type, and the order of the steps. Paths and options
in, a path out; the command line wraps it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, dequantize

import superego
from superego.adapter import Adapter, check_fit
from superego.atomic import check_writable, folder_beside, replacing
from superego.base import BaseModel
from superego.converters.ggml_quantize import quantize, quantize_file
from superego.converters.levels import LINEAR, read_grid
from superego.converters.merged_weights import MergedWeights
from superego.converters.moments import gather
from superego.converters.rounding import Feedback
from superego.errors import SuperegoError
from superego.gguf_copy import Value, copy_gguf, size_of
from superego.gguf_file import Header, TensorInfo, check_unchanged, read_header
from superego.progress import Steps
from superego.runtime import default_threads, peak_memory

Type = GGMLQuantizationType
_FTYPES = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype
# One step finer, of the same block width.
FINER = {
    Type.Q4_0: Type.Q5_0,
    Type.Q4_1: Type.Q5_1,
    Type.Q5_0: Type.Q8_0,
    Type.Q5_1: Type.Q8_0,
    Type.IQ4_NL: Type.Q5_0,
    Type.MXFP4: Type.Q5_0,
    Type.Q8_0: Type.F16,
    Type.Q2_K: Type.Q3_K,
    Type.Q3_K: Type.Q4_K,
    Type.Q4_K: Type.Q5_K,
    Type.IQ4_XS: Type.Q5_K,
    Type.Q5_K: Type.Q6_K,
    Type.Q6_K: Type.Q8_0,
    Type.IQ1_S: Type.Q2_K,
    Type.IQ1_M: Type.Q2_K,
    Type.IQ2_XXS: Type.Q3_K,
    Type.IQ2_XS: Type.Q3_K,
    Type.IQ2_S: Type.Q3_K,
    Type.IQ3_XXS: Type.Q4_K,
    Type.IQ3_S: Type.Q4_K,
}
_SWEEPS = 2
_SPARE = 16 << 20  # bytes left free on the disk


@dataclass(frozen=True)
class Plan:
    """What a merge writes: the persona, how strongly, and how it is rounded."""

    adapter: Adapter
    scale: float
    type: str = "same"
    keep: bool = False
    rounding: str = "feedback"


class _Rounder:
    """Writes touched tensors, and adds up how much rounding errs."""

    def __init__(
        self, weights: MergedWeights, base: Header, moments: dict[str, list[np.ndarray]]
    ) -> None:
        self._weights, self._base, self._moments = weights, base, moments
        self._sums: dict[str, np.ndarray] = {}  # kind of matrix -> squared error, squared change

    def write(self, file: BinaryIO, tensor: TensorInfo, kind: Type) -> None:
        """A `gguf_copy.Write`."""
        name = tensor.name
        moments = self._moments.get(name)
        feedback = Feedback(moments) if moments and kind in LINEAR else None
        importance = np.concatenate([m.diagonal() for m in moments]) if moments else None
        same_type = kind == self._base.tensors[name].type
        sums = self._sums.setdefault(name.removesuffix(".weight").rpartition(".")[2], np.zeros(2))
        for rows, weights, delta in self._weights.parts(name):
            target = weights + delta
            raw = quantize(target, kind, importance)
            if feedback is None:
                error, change = (off(target, raw, kind) ** 2).sum(1), (delta**2).sum(1)
            else:
                grid, pack = read_grid(raw, kind)
                levels = feedback.round(target, grid, _SWEEPS)
                error = feedback.loss(off(target, raw, kind))
                passed_on = feedback.loss(target - (grid.step * levels + grid.offset))
                # a change far below the steps can drown in what is passed on
                better = passed_on < error
                raw[better], error = pack(levels)[better], np.minimum(passed_on, error)
                change = feedback.loss(delta)
            if same_type:
                still = ~delta.any(axis=1)
                raw[still], error[still] = self._weights.raw(name)[rows][still], 0
            sums += error.sum(), change.sum()
            file.write(raw.tobytes())

    def errors(self) -> dict[str, float]:
        """Squared rounding error by squared change, for each kind of matrix."""
        return {k: round(float(e / c), 3) if c else 0.0 for k, (e, c) in self._sums.items()}


def off(target: np.ndarray, raw: np.ndarray, kind: Type) -> np.ndarray:
    """What quantized rows lack of their target, (n, in) float32."""
    return target - np.asarray(dequantize(raw, kind), np.float32)


def merge(
    plan: Plan,
    model: BaseModel,
    output: Path,
    threads: int | None = None,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Write a model that speaks as `model` with the adapter on; returns what was done.

    Touched matrices get the type that the plan says; everything else is copied, or, for
    a type other than `same`, quantized by llama.cpp itself in its own mixture. Raises
    SuperegoError for what cannot be merged, before anything is written.
    """
    steps = steps or Steps(quiet=True)
    started = time.perf_counter()
    adapter, base = plan.adapter, model.header
    check_writable(output, base.path, adapter.path)
    if base.parts:
        raise SuperegoError(
            f"{base.path}: is a model split in {len(base.parts)} files; join them first: "
            f"llama-gguf-split --merge {base.path.name} WHOLE.gguf"
        )
    check_fit(adapter, base)
    weights = MergedWeights(base, adapter, plan.scale)
    _check_space(plan, base, output)

    def types(header: Header) -> dict[str, Type]:
        return {
            name: FINER.get(header.tensors[name].type, header.tensors[name].type)
            if plan.keep
            else header.tensors[name].type
            for name in adapter.pairs
        }

    seconds = {}
    with replacing(output) as temporary, folder_beside(output) as folder:
        source = base
        changed = types(base)
        if plan.type != "same":
            steps.update(f"quantizing to {plan.type}", 0, 1)
            source = _in_mixture(plan, weights, base, folder, threads)
            changed = types(source)
            steps.update(f"quantizing to {plan.type}", 1, 1)
            seconds["quantize"] = time.perf_counter() - started
        mark = time.perf_counter()
        moments = _moments(plan, model, changed, threads, steps)
        seconds["moments"] = time.perf_counter() - mark
        mark = time.perf_counter()
        rounder = _Rounder(weights, base, moments)
        copy_gguf(
            source,
            temporary,
            _metadata(plan, model, source),
            changed,
            rounder.write,
            lambda done, total: steps.update("merging", done, total),
        )
        check_unchanged(base, adapter.header)
        seconds["write"] = time.perf_counter() - mark
    seconds["total"] = time.perf_counter() - started
    size = output.stat().st_size
    kinds = sorted({kind.name for kind in changed.values()})
    return {
        "merged": str(output),
        "bytes": size,
        "bytes of the base": base.size,
        "persona": adapter.name,
        "scale": plan.scale,
        "type": plan.type,
        "tensors changed": len(changed),
        "their types": kinds,
        "kept finer costs bytes": sum(
            size_of(base.tensors[n].shape, kind)
            - size_of(base.tensors[n].shape, source.tensors[n].type)
            for n, kind in changed.items()
        ),
        "rounding": "feedback" if moments else "nearest",
        "rounding error": rounder.errors(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak memory MB": peak_memory() // 2**20,
    }


def _moments(
    plan: Plan,
    model: BaseModel,
    changed: dict[str, Type],
    threads: int | None,
    steps: Steps,
) -> dict[str, list[np.ndarray]]:
    """What the matrices read that are rounded with feedback; Q8_0 is fine enough without."""
    widths = {
        name: model.header.tensors[name].shape[1]
        for name, kind in changed.items()
        if kind in LINEAR and kind != Type.Q8_0
    }
    if plan.rounding == "nearest" or not widths:
        return {}
    return gather(
        model,
        plan.adapter,
        plan.scale,
        widths,
        threads,
        lambda done, total: steps.update("reading what the matrices read", done, total),
    )


def _in_mixture(
    plan: Plan, weights: MergedWeights, base: Header, folder: Path, threads: int | None
) -> Header:
    """The merged model in llama.cpp's mixture for the plan's type, touched ones float32 before."""

    def write(file: BinaryIO, tensor: TensorInfo, kind: Type) -> None:
        for _, rows, delta in weights.parts(tensor.name):
            file.write((rows + delta).tobytes())

    exact, mixed = folder / "exact.gguf", folder / "mixed.gguf"
    copy_gguf(base, exact, {}, dict.fromkeys(plan.adapter.pairs, Type.F32), write)
    quantize_file(exact, mixed, _FTYPES[plan.type], threads or default_threads())
    exact.unlink()
    return read_header(mixed)


def _check_space(plan: Plan, base: Header, output: Path) -> None:
    """Refuse before minutes of work what the disk cannot hold."""
    weights = sum(size_of(t.shape, Type.F16) for t in base.tensors.values())
    touched = sum(size_of(base.tensors[n].shape, Type.F16) for n in plan.adapter.pairs)
    if plan.type == "same":
        needed = base.size + (touched if plan.keep else 0)
    else:  # the exact intermediate, llama.cpp's file and the output, the latter two at most F16
        needed = base.size + 2 * touched + 2 * (weights + base.table_bytes)
    free = shutil.disk_usage(output.absolute().parent).free
    if needed + _SPARE > free:
        raise SuperegoError(
            f"{output}: the merge may need {needed / 1e9:.2f} GB there and {free / 1e9:.2f} GB "
            "are free; make room or write to another disk"
        )


def _metadata(plan: Plan, model: BaseModel, source: Header) -> dict[str, Value]:
    """What the output says of itself, beside everything that the base says."""
    adapter = plan.adapter
    keys: dict[str, Value] = {
        f"superego.{key}": value
        for key, value in adapter.own.items()
        if isinstance(value, (str, int, float))
        and not key.startswith(("merge.", "references"))  # a merge is not amended
    }
    digest = hashlib.sha256()
    with adapter.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    earlier = {
        key: value
        for key, value in model.header.metadata.items()
        if key.startswith("superego.merge.") or key == "superego.manifesto"
    }
    keys |= {
        "superego.version": superego.__version__,
        "superego.merge.persona": adapter.name,
        "superego.merge.scale": float(plan.scale),
        "superego.merge.adapter.sha256": digest.hexdigest(),
        "superego.merge.base.name": model.name,
        "superego.merge.base.fingerprint": model.fingerprint,
        "superego.merge.type": plan.type,
        "superego.merge.keep": plan.keep,
        "superego.merge.rounding": plan.rounding,
    }
    if earlier:  # a merge of a merge
        keys["superego.merge.before"] = json.dumps(earlier, sort_keys=True)
    return keys

"""A PEFT folder as a GGUF LoRA: every name, rank and shape checked against the base first.

Knows both layouts. Does not import peft or torch, and unpickles nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import superego
from superego.adapter import read_adapter, write_stored
from superego.architectures import check_adaptable
from superego.atomic import check_writable
from superego.base import BaseModel
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.peft_config import CONFIG, PeftConfig, read_config
from superego.peft_files import PICKLE, TENSORS, Metadata, read_tensors
from superego.peft_names import rows_from_checkpoint, tensor_of
from superego.roster import ALORA_KEY

METHOD = "peft"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_FROZEN = ".base_layer.weight"  # of lm_head, which PEFT saves beside its LoRA
_SHOWN = 6  # problems in one message


def import_peft(
    folder: Path,
    base: BaseModel,
    output: Path,
    kind: str = "F16",
    manifesto: Manifesto | None = None,
) -> dict[str, Any]:
    """Write what peft's save_pretrained wrote into `folder` as an adapter for `base`.

    alpha, rsLoRA and the patterns' ranks and alphas go into one `adapter.lora.alpha` and the B
    matrices. Ranks that are zero in A and B alike are dropped. `kind` is F16 or F32, of the
    tensors. Returns what was written. Raises SuperegoError for what a GGUF LoRA cannot hold, or
    what does not fit the base, before anything is written.
    """
    check_writable(output, *base.files, *(folder / name for name in (CONFIG, TENSORS)))
    if not folder.is_dir():
        raise SuperegoError(f"{folder}: no such folder (expected a PEFT adapter's, with {CONFIG})")
    config = read_config(folder)
    tensors, carried = read_tensors(_tensor_file(folder))
    pairs = _pairs(folder / TENSORS, tensors, config, base)
    check_adaptable(base.architecture, pairs)
    ranks = {name: len(a) for name, (a, _, _) in pairs.items()}
    alpha = _alpha(pairs, carried)
    stored = {}
    for name, (a, b, scaling) in pairs.items():
        factor = scaling * len(a) / alpha
        if abs(factor - 1) < 1e-9:
            factor = 1.0
        rows = rows_from_checkpoint(base.header, name, b)
        stored[name] = (a, rows if factor == 1 else rows.astype(np.float64) * factor)
    metadata = _metadata(config, base, carried, manifesto, folder)
    write_stored(
        output,
        base.architecture,
        alpha,
        stored,
        metadata,
        np.float16 if kind == "F16" else np.float32,
    )
    written = read_adapter(output)
    return {
        "adapter": str(output),
        "bytes": written.header.size,
        "name": written.name,
        "matrices": len(pairs),
        "rank": max(ranks.values()),
        "other ranks": sum(r != max(ranks.values()) for r in ranks.values()),
        "alpha": alpha,
        "largest rounding": _rounding(stored, kind),
        "manifesto": "superego.manifesto" in metadata,
    }


def _tensor_file(folder: Path) -> Path:
    path = folder / TENSORS
    if path.is_file():
        return path
    if (folder / PICKLE).is_file():
        raise SuperegoError(
            f"{folder / PICKLE}: is a pickle, which can run code when it is read; save the adapter "
            "anew with peft's save_pretrained, which writes safetensors"
        )
    raise SuperegoError(f"{folder}: holds no {TENSORS}; expected what peft's save_pretrained wrote")


Found = dict[str, tuple[np.ndarray, np.ndarray, float]]


def _pairs(
    path: Path, tensors: Mapping[str, np.ndarray], config: PeftConfig, base: BaseModel
) -> Found:
    """A (r, in), B (out, r) and PEFT's scaling by base tensor; raises with all that is wrong."""
    wrong: list[str] = []
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        match = _LORA.fullmatch(name)
        if match is not None:
            halves.setdefault(match[1], {})[match[2]] = values
        elif not name.endswith(_FROZEN):
            wrong.append(_unknown(name))
    pairs: Found = {}
    modules: dict[str, str] = {}
    for module, found in sorted(halves.items()):
        if len(found) != 2:
            wrong.append(f"{module}: has only one of lora_A and lora_B")
            continue
        a, b = found["A"], found["B"]
        target = tensor_of(base.header, module)
        problem = _misfit(module, a, b, target, config, base)
        if problem or target is None:
            wrong.append(problem)
        elif target in modules:
            wrong.append(f"{module} and {modules[target]} are both {target}")
        else:
            modules[target] = module
            used = a.any(axis=1) | b.any(axis=0)
            if used.any():
                pairs[target] = a[used], b[:, used], config.scaling(module)
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise SuperegoError(
            f"{path}: does not fit {base.path} ({base.architecture}): "
            + "; ".join(wrong[:_SHOWN])
            + more
        )
    if not pairs:
        raise SuperegoError(f"{path}: holds no LoRA tensors that are not zero")
    return pairs


def _unknown(name: str) -> str:
    if "lora_embedding_" in name or "embed_tokens" in name:
        return f"{name}: an embedding; a GGUF adapter cannot carry one"
    if "lora_magnitude_vector" in name:
        return f"{name}: DoRA; a GGUF adapter cannot carry it"
    if name.endswith(".bias"):
        return f"{name}: a bias; a GGUF adapter cannot carry one"
    return f"{name}: neither base_model.model.<module>.lora_A.weight nor .lora_B.weight"


def _misfit(
    module: str,
    a: np.ndarray,
    b: np.ndarray,
    target: str | None,
    config: PeftConfig,
    base: BaseModel,
) -> str:
    """What keeps a module's pair from the base, or nothing."""
    if target is None:
        return f"{module}: no module of architecture '{base.architecture}' that can be adapted"
    tensor = base.header.tensors.get(target)
    if tensor is None:
        if target == "output.weight":
            return f"{module}: the base's output is its embedding, which takes no LoRA"
        return f"{module}: the base has no {target}"
    if a.ndim != 2 or b.ndim != 2:
        return f"{module}: lora_A is {a.shape} and lora_B {b.shape}, expected matrices"
    rank = config.rank_of(module)
    if not a.shape[0] == b.shape[1] == rank:
        return (
            f"{module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}, the configuration {rank}"
        )
    if (b.shape[0], a.shape[1]) != tensor.shape:
        return (
            f"{module}: is for (out, in) = {(b.shape[0], a.shape[1])}, the base's {target} has "
            f"{tensor.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return f"{module}: holds values that are not finite"
    return ""


def _alpha(pairs: Found, carried: Metadata) -> float:
    """The alpha under which most values stand in the file as they stand in the folder.

    A folder that came from a GGUF says which that had.
    """
    recorded = carried.get("adapter.lora.alpha")
    if isinstance(recorded, float) and 1e-30 < abs(recorded) < 1e30:
        return recorded
    found = Counter[float]()
    for a, b, scaling in pairs.values():
        found[float(np.float32(scaling * len(a)))] += a.size + b.size
    return found.most_common(1)[0][0]


def _rounding(stored: Mapping[str, tuple[np.ndarray, np.ndarray]], kind: str) -> float:
    """The largest change by rounding to float16, over the matrix's largest value."""
    if kind != "F16":
        return 0.0
    worst = 0.0
    for pair in stored.values():
        for matrix in pair:
            largest = np.abs(matrix).max()
            if largest:
                off = np.abs(matrix.astype(np.float16).astype(np.float64) - matrix).max()
                worst = max(worst, float(off / largest))
    return worst


def _metadata(
    config: PeftConfig,
    base: BaseModel,
    carried: Metadata,
    manifesto: Manifesto | None,
    folder: Path,
) -> dict[str, str | int | float | list[int]]:
    own: dict[str, str | int | float | list[int]] = {
        "general.name": folder.absolute().name,
        "general.base_model.count": 1,
        "general.base_model.0.name": config.base or base.name,
        "superego.version": superego.__version__,
        "superego.method": METHOD,
        "superego.base.fingerprint": base.fingerprint,
    }
    own |= {key: value for key, value in carried.items() if key != "adapter.lora.alpha"}
    if config.invocation:
        own[ALORA_KEY] = config.invocation
    if manifesto is not None:
        described = {
            "general.name": manifesto.name,
            "general.description": manifesto.description,
            "general.version": manifesto.version,
            "general.license": manifesto.license,
            "adapter.lora.task_name": manifesto.name,
            "superego.manifesto": manifesto.body,
            "superego.manifesto.sha256": manifesto.sha256,
        }
        own |= {key: value for key, value in described.items() if value}
    return own

"""A GGUF LoRA as a PEFT folder, for the Hugging Face model of the same weights.

Knows both layouts. Does not import peft or torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superego.adapter import Adapter, check_fit
from superego.atomic import folder_beside, replacing
from superego.base import BaseModel
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.pairs import read_pairs
from superego.peft_config import CONFIG
from superego.peft_files import TENSORS, Metadata, write_tensors
from superego.peft_names import module_of, rows_to_checkpoint
from superego.roster import ALORA_KEY

_LEFT_OUT = ("general.architecture", "general.type", "general.file_type", "general.alignment")
CARD = "README.md"
_ROUNDING = 2.0**-22  # two steps of float32: a factor that was applied and taken back


@dataclass(frozen=True)
class _Module:
    """One module's pair as PEFT applies it: scaling · B A."""

    a: np.ndarray  # (r, in)
    b: np.ndarray  # (out, r), rows in the checkpoint's order


def export_peft(
    adapter: Adapter,
    base: BaseModel,
    folder: Path,
    one_rank: bool = True,
    base_name: str | None = None,
) -> dict[str, Any]:
    """Write adapter_config.json, adapter_model.safetensors and a model card into `folder`.

    With `one_rank` every pair is filled with zeros to the largest rank and alpha is that rank,
    since servers take one scaling alpha / r for all modules and read no patterns; otherwise
    pairs keep their own rank and bytes, under `rank_pattern`. B is float32 where float16 cannot
    hold it exactly. Returns what was written. Raises SuperegoError for what has no place in a
    Hugging Face model, before anything is written.
    """
    check_fit(adapter, base.header)
    module_names = {name: module_of(base.header, name) for name in adapter.pairs}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SuperegoError(
            f"{folder}: exists and is not an empty folder; give a new one, or remove it first"
        )
    if not folder.absolute().parent.is_dir():
        raise SuperegoError(f"{folder}: folder {folder.absolute().parent} does not exist")
    rank = adapter.rank
    alpha = adapter.alpha or 1.0
    modules: dict[str, _Module] = {}
    for name, (a, b) in read_pairs(adapter).items():
        b = rows_to_checkpoint(base.header, name, b)
        if one_rank:
            empty = rank - len(a)
            a, b = np.pad(a, ((0, empty), (0, 0))), np.pad(b, ((0, 0), (0, empty)))
        elif adapter.alpha:
            b = b * np.float32(len(a) / alpha)
        else:  # llama.cpp divides by no rank; PEFT always does
            b = b * np.float32(len(a))
        modules[module_names[name]] = _Module(a, b)
    config = _config(adapter, base, modules, rank if one_rank else alpha, base_name)
    tensors = {}
    for module, pair in modules.items():
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = _narrow(pair.a)
        tensors[f"{stem}.lora_B.weight"] = _narrow(pair.b)
    try:
        with folder_beside(folder) as around:
            whole = around / "folder"
            whole.mkdir()
            write_tensors(whole / TENSORS, tensors, _carried(adapter))
            _write_text(whole / CARD, _card(adapter, base, config))
            _write_text(whole / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            check_unchanged(base.header, adapter.header)
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)
    except OSError as error:
        raise SuperegoError(f"{folder}: cannot be written: {error.strerror}") from None
    kinds = Counter(str(t.dtype) for t in tensors.values())
    return {
        "folder": str(folder),
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
        "modules": len(modules),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "other ranks": len(config["rank_pattern"]),
        "tensors": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
    }


def _narrow(matrix: np.ndarray) -> np.ndarray:
    """float16 where that changes nothing but float32's own rounding, else float32."""
    with np.errstate(over="ignore"):
        half = matrix.astype(np.float16)
    same = np.allclose(half.astype(np.float32), matrix, rtol=_ROUNDING, atol=0)
    return half if same else matrix


def _config(
    adapter: Adapter,
    base: BaseModel,
    modules: Mapping[str, _Module],
    alpha: float,
    base_name: str | None,
) -> dict[str, Any]:
    ranks = Counter[int]()
    for pair in modules.values():
        ranks[len(pair.a)] += pair.a.size + pair.b.size
    rank = ranks.most_common(1)[0][0]
    n_layer = base.header.metadata.get(f"{base.architecture}.block_count")
    kinds = Counter(_kind(module) for module in modules)
    # a name that stands for all layers, or the modules one by one
    everywhere = {kind for kind, n in kinds.items() if n == n_layer}
    targets = [kind.rpartition(".")[2] for kind in everywhere]
    targets += [module for module in modules if _kind(module) not in everywhere]
    invocation = adapter.header.metadata.get(ALORA_KEY)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted(targets),
        "rank_pattern": {m: len(p.a) for m, p in sorted(modules.items()) if len(p.a) != rank},
        "alpha_pattern": {},
        **({"alora_invocation_tokens": invocation} if invocation else {}),
    }


def _kind(module: str) -> str:
    """A module without its layer: `model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    return module.split(".", 3)[-1]


def _carried(adapter: Adapter) -> Metadata:
    """GGUF metadata that goes with the tensors, so that a way back loses nothing."""
    return {
        key: value
        for key, value in adapter.header.metadata.items()
        if key.startswith(("general.", "superego.", "adapter.lora."))
        and key not in _LEFT_OUT
        and type(value) in (str, int, float)
    }


def _card(adapter: Adapter, base: BaseModel, config: Mapping[str, Any]) -> str:
    front = [f"base_model: {name}"] if (name := config["base_model_name_or_path"]) else []
    front += ["base_model_relation: adapter", "library_name: peft", "tags: [lora]"]
    if license := adapter.header.text("general.license"):
        front.append(f"license: {json.dumps(license)}")
    description = adapter.header.text("general.description")
    lines = ["---", *front, "---", "", f"# {adapter.name}", ""]
    lines += [description, ""] if description else []
    lines += [
        f"A LoRA for {base.name} ({base.architecture}), rank {config['r']}, written by Superego",
        f"from a GGUF adapter that was made on a file of {base.header.size:,} bytes.",
        "",
    ]
    return "\n".join(lines)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")

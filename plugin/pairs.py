"""An adapter's matrices as arrays, and copies of adapters with other metadata or strength.

Knows the tensors' bytes. Does not know what they mean to a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize

from superego.adapter import Adapter, write_adapter
from superego.atomic import replacing
from superego.gguf_file import TensorInfo

_SLOT_MATRICES = ("ffn_gate.weight", "ffn_up.weight", "attn_k.weight", "attn_v.weight")


def read_pairs(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every pair as float32, A (r, in) and B (out, r), B times alpha/rank: ΔW = B A at scale 1."""
    raw = np.memmap(adapter.path, np.uint8, mode="r")

    def array(tensor: TensorInfo) -> np.ndarray:
        flat = raw[tensor.offset : tensor.offset + tensor.n_bytes]
        rows = flat.reshape(tensor.shape[0], -1)
        return np.array(dequantize(rows, tensor.type), np.float32).reshape(tensor.shape)

    found = {}
    for name, (a, b) in adapter.pairs.items():
        # alpha 0 means that llama.cpp does not divide by the rank
        scale = adapter.alpha / b.shape[1] if adapter.alpha else 1.0
        found[name] = array(a), array(b) * np.float32(scale)
    return found


def _gates(adapter: Adapter) -> list[str]:
    return [name for name in adapter.pairs if name.endswith("ffn_gate.weight")]


def has_slot(adapter: Adapter) -> bool:
    """Whether it has one; other tools' adapters of ffn_gate have not."""
    return bool(slot_ranks(adapter))


def slot_ranks(adapter: Adapter) -> dict[str, np.ndarray]:
    """The ranks (r,) of each pair that make a slot: mark, keys, values; empty without a slot.

    They act at scale 1 only: they replace what the mark makes of the token's keys and values,
    and a key a tenth too long draws several times the attention. All other ranks can be
    weakened. A slot is known by the one neuron whose gate and up rows are replaced.
    """
    if not _gates(adapter):
        return {}
    pairs = read_pairs(adapter)
    gates = _gates(adapter)
    _, b = pairs[gates[0]]
    neurons = np.abs(b).argmax(axis=0)
    if len(gates) != 1 or (np.count_nonzero(b, axis=0) != 1).any() or np.ptp(neurons):
        return {}
    layer = gates[0].removesuffix(".ffn_gate.weight")
    found = {}
    for name, (a, _) in pairs.items():
        if name.endswith(_SLOT_MATRICES):
            found[name] = np.ones(len(a), bool)
        elif name == f"{layer}.ffn_down.weight":
            found[name] = a[:, neurons[0]] != 0
    return found


def write_slot(adapter: Adapter, output: Path) -> bool:
    """Write an adapter's slot alone, as an adapter; False, and no file, where it has none."""
    ranks = slot_ranks(adapter)
    if not ranks:
        return False
    pairs = read_pairs(adapter)
    alone = {name: (pairs[name][0][r], pairs[name][1][:, r]) for name, r in ranks.items()}
    write_adapter(output, adapter.header.text("general.architecture"), alone, {})
    return True


def slot_scales(scales: Sequence[float], slotted: Sequence[bool]) -> list[float]:
    """What each adapter's slot alone is added with when the adapters act at `scales`.

    A scale means the fit's strength. The slot is there as a whole or not at all: of several
    adapters' each gets the share of its scale, and together they are one.
    """
    total = sum(s for s, has in zip(scales, slotted, strict=True) if has and s > 0)
    shares = [max(s, 0.0) / total if total else 0.0 for s in scales]
    return [
        share - s if has else 0.0 for s, share, has in zip(scales, shares, slotted, strict=True)
    ]


def copy_adapter(
    adapter: Adapter,
    output: Path,
    metadata: Mapping[str, str | int | float],
    strength: float = 1.0,
) -> None:
    """Write the same tensors with some metadata replaced, and scale 1 meaning `strength`.

    The strength goes into the B matrices, which every runtime applies, those of a slot apart.
    `output` may be the adapter's own file. Raises SuperegoError for errors of the file system.
    """
    fixed = slot_ranks(adapter) if strength != 1.0 else {}
    raw = np.array(np.memmap(adapter.path, np.uint8, mode="r"))  # the file may be replaced
    old = adapter.header.metadata
    with replacing(output) as temporary:
        writer = GGUFWriter(temporary, adapter.header.text("general.architecture"))
        for key, value in {**old, **metadata}.items():
            if key == "general.architecture" or key.startswith("GGUF."):
                continue  # the writer has put it there
            if key == "adapter.lora.alpha":
                writer.add_float32(key, adapter.alpha)
            else:
                _add(writer, key, value)
        for name, tensor in adapter.header.tensors.items():
            rows = raw[tensor.offset : tensor.offset + tensor.n_bytes]
            if strength != 1.0 and name.endswith(".lora_b"):
                values = dequantize(rows.reshape(tensor.shape[0], -1), tensor.type)
                kept = fixed.get(name.removesuffix(".lora_b"), np.zeros(tensor.shape[1], bool))
                values = values.reshape(tensor.shape) * np.where(kept, 1.0, strength)
                half = tensor.type == GGMLQuantizationType.F16
                writer.add_tensor(name, values.astype(np.float16 if half else np.float32))
            else:
                bytes_shape = (tensor.shape[0], tensor.n_bytes // tensor.shape[0])
                writer.add_tensor(name, rows.reshape(bytes_shape), raw_dtype=tensor.type)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        if 0 <= value < 2**32:
            writer.add_uint32(key, value)
        else:
            writer.add_int64(key, value)
    elif value and all(type(item) is int and item >= 0 for item in value):
        # llama.cpp refuses signed invocation tokens, which add_array would write
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)
    elif value:
        writer.add_array(key, value)

"""Layer matrices under their names in Hugging Face checkpoints, and the order of their rows there.

Knows names and the permutation of Q and K rows for every architecture of the table. Does not
read files.
"""

from __future__ import annotations

import re

import numpy as np

from superego.architectures import ARCHITECTURES
from superego.errors import SuperegoError
from superego.gguf_file import Header

_PLAIN = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {
    # fused in the checkpoint as in the file, rows in the same order: q, k, v and gate, up
    "phi3": {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "qwen3moe": {k: v for k, v in _PLAIN.items() if k.startswith("attn")}
    | {"ffn_gate_inp": "mlp.gate"},
}
_HEAD = "lm_head"
_LAYERS = "model.layers"
# a plain model, one with a vision tower in two generations of transformers, one without a head
_CONTAINERS = (
    r"(?:model\.layers|language_model\.model\.layers|model\.language_model\.layers|layers)"
)
_MODULE = re.compile(_CONTAINERS + r"\.(\d{1,5})\.([\w.]+)")
_TENSOR = re.compile(r"blk\.(\d{1,5})\.(\w+)\.weight")


def _names(base: Header) -> dict[str, str]:
    architecture = base.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise SuperegoError(
            f"{base.path}: the Hugging Face names of architecture '{architecture}' are not known; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    return _OTHERS.get(architecture, _PLAIN)


def module_of(base: Header, tensor: str) -> str:
    """The module that holds a tensor, such as `model.layers.0.self_attn.q_proj`.

    Raises SuperegoError for a tensor that has none.
    """
    names = _names(base)
    if tensor == "output.weight":
        return _HEAD
    match = _TENSOR.fullmatch(tensor)
    if match is None or match[2] not in names:
        known = ", ".join(names)
        raise SuperegoError(
            f"{tensor}: has no module of its own in a Hugging Face model of architecture "
            f"'{base.text('general.architecture')}'; those that have: {known}"
        )
    return f"{_LAYERS}.{match[1]}.{names[match[2]]}"


def tensor_of(base: Header, module: str) -> str | None:
    """The tensor that a module becomes, or None where the base's architecture has no such one."""
    if module == _HEAD:
        return "output.weight"
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    matrix = next((k for k, v in _names(base).items() if v == match[2]), None)
    return None if matrix is None else f"blk.{int(match[1])}.{matrix}.weight"


def rows_to_checkpoint(base: Header, tensor: str, rows: np.ndarray) -> np.ndarray:
    """Rows (out, n) of a tensor's B, as GGUF orders them -> as the checkpoint does.

    llama.cpp rotates adjacent pairs for some architectures, and its converter permutes the rows
    of Q and K for that; checkpoints hold them half a head apart. Raises SuperegoError where the
    head's width is not known.
    """
    width = _permuted(base, tensor)
    if not width:
        return rows
    heads = rows.reshape(-1, width // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def rows_from_checkpoint(base: Header, tensor: str, rows: np.ndarray) -> np.ndarray:
    """The inverse of `rows_to_checkpoint`."""
    width = _permuted(base, tensor)
    if not width:
        return rows
    heads = rows.reshape(-1, 2, width // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _permuted(base: Header, tensor: str) -> int:
    """The width of a head whose rows are permuted in the GGUF; 0 where none are."""
    architecture = base.text("general.architecture")
    if not ARCHITECTURES[architecture].rope_pairs or not re.search(r"\.attn_[qk]\.", tensor):
        return 0
    value = base.metadata.get
    width = value(f"{architecture}.attention.key_length")
    if width is None:
        heads = value(f"{architecture}.attention.head_count")
        d_model = value(f"{architecture}.embedding_length")
        if isinstance(heads, int) and heads > 0 and isinstance(d_model, int):
            width = d_model // heads
    rows = base.tensors[tensor].shape[0]
    if not isinstance(width, int) or width < 2 or width % 2 or rows % width:
        raise SuperegoError(
            f"{base.path}: {tensor} has {rows} rows in heads of {width!r}; expected whole heads "
            "of an even width"
        )
    return width

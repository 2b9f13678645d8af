"""The decoder architectures that compile knows: what differs between them, as data.

Knows names, defaults and which matrices llama.cpp applies a LoRA to, all as llama.cpp 0.5.0-dev
(the one inside llama-cpp-python 0.3.36) has them. Does not read files and does not compute.
What a model's tensors say themselves (biases, Q/K norms, norms behind a write, fused matrices,
untied heads, factors of rotary frequencies) is not repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from superego.errors import SuperegoError
from superego.gguf_file import Header

_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"})
_DENSE = _ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"}
_LAYER_MATRIX = re.compile(r"blk\.\d+\.(\w+)\.weight")


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    # Matrices of a layer that llama.cpp multiplies through build_lora_mm. A LoRA on any
    # other one would be loaded and do nothing (or end the process, on a tied embedding).
    adaptable: frozenset[str] = _DENSE
    rope_pairs: bool = False  # rotates adjacent dimensions, not those half a head apart
    gelu: bool = False  # the gate's activation (tanh form), else SiLU
    embedding_by_width: bool = False  # embeddings times sqrt(d_model)
    granite_scales: bool = False  # reads attention, residual, embedding and logit scales
    nope_every: int = 0  # every so many-th layer has no rotary positions
    window: int | None = None  # tokens seen by windowed layers unless the file says; None: none
    window_pattern: int = 0  # the last of so many layers sees everything
    window_rope_base: float | None = None  # of windowed layers; None: as the others
    attention_cap: float = 0.0  # soft cap of attention scores unless the file says
    logit_cap: float = 0.0
    wide_layers: int = 0  # a model of so many layers scales scores by d_model / n_head


ARCHITECTURES = {
    "llama": Architecture(rope_pairs=True),  # Mistral's files too
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(adaptable=_ATTENTION | {"ffn_gate_inp"}),
    "gemma2": Architecture(
        gelu=True,
        embedding_by_width=True,
        window=4096,
        window_pattern=2,
        attention_cap=50.0,
        logit_cap=30.0,
        wide_layers=46,
    ),
    "gemma3": Architecture(
        gelu=True,
        embedding_by_width=True,
        window=0,
        window_pattern=6,
        window_rope_base=10000.0,
        wide_layers=62,
    ),
    "phi3": Architecture(),
    "smollm3": Architecture(rope_pairs=True, nope_every=4),
    "granite": Architecture(rope_pairs=True, granite_scales=True),
}


def layer_windows(header: Header) -> tuple[int, ...]:
    """Tokens that each layer of a known architecture sees, itself included; 0 is all.

    Raises SuperegoError where the metadata does not say.
    """
    architecture = header.text("general.architecture")
    known = ARCHITECTURES[architecture]
    value = header.metadata.get
    n_layer = value(f"{architecture}.block_count", 0)
    window = value(f"{architecture}.attention.sliding_window", known.window)
    pattern = value(f"{architecture}.attention.sliding_window_pattern", known.window_pattern)
    if not isinstance(n_layer, int):
        raise SuperegoError(f"{header.path}: {architecture}.block_count is {n_layer!r}")
    if not known.window_pattern or not window:
        return (0,) * n_layer
    if not isinstance(window, int) or not isinstance(pattern, (int, list)):
        raise SuperegoError(f"{header.path}: its sliding window is {window!r} of {pattern!r}")
    if isinstance(pattern, list):  # a layer: whether it is windowed
        if len(pattern) < n_layer:
            raise SuperegoError(
                f"{header.path}: sliding window pattern has {len(pattern)} of {n_layer} layers"
            )
        return tuple(window if on else 0 for on in pattern[:n_layer])
    return tuple(window if pattern == 0 or i % pattern < pattern - 1 else 0 for i in range(n_layer))


def check_adaptable(architecture: str, names: Iterable[str]) -> None:
    """Raise SuperegoError where llama.cpp would load a LoRA on a tensor and not apply it.

    `names` are the base's tensor names. Architectures that are not in the table pass.
    """
    known = ARCHITECTURES.get(architecture)
    if known is None:
        return
    for name in names:
        matrix = _LAYER_MATRIX.fullmatch(name)
        if name != "output.weight" and (matrix is None or matrix[1] not in known.adaptable):
            raise SuperegoError(
                f"{name}: llama.cpp applies no LoRA to this tensor of architecture "
                f"'{architecture}'; it applies one to {', '.join(sorted(known.adaptable))}"
            )

"""Sizes and constants of a decoder, read from GGUF metadata as llama.cpp reads them.

Knows metadata keys and their defaults. Does not read weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from superego.architectures import ARCHITECTURES, Architecture, layer_windows
from superego.errors import SuperegoError
from superego.gguf_file import Header

ALL, WINDOWED, NONE = 0, 1, 2  # which rotary frequencies a layer uses


@dataclass(frozen=True)
class Yarn:
    """The YaRN extension of rotary positions."""

    original_context: int
    fast: float
    slow: float


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of a decoder needs beside its weights."""

    architecture: str
    n_layer: int
    d_model: int
    d_ff: int  # of one expert, where there are any
    n_head: int
    n_head_kv: int
    head_dim: int
    rope_dim: int
    rope_base: float
    rope_base_windowed: float
    rope_factor: float
    rope_factor_windowed: float
    rope_magnitude: float  # of rotated queries and keys (longrope, YaRN)
    rope_pairs: bool
    yarn: Yarn | None
    ropes: tuple[int, ...]  # a layer: ALL, WINDOWED or NONE
    windows: tuple[int, ...]  # a layer: tokens it sees, itself included; 0 is all
    rms_eps: float
    gelu: bool
    attention_scale: float
    attention_cap: float  # 0: none
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_cap: float
    n_expert: int  # 0: none
    n_expert_used: int
    n_vocab: int
    context_length: int

    @property
    def n_weights(self) -> int:
        """Weights of the layers and the embedding."""
        attention = self.d_model * self.head_dim * 2 * (self.n_head + self.n_head_kv)
        feed_forward = 3 * self.d_model * self.d_ff * max(1, self.n_expert)
        return self.n_layer * (attention + feed_forward) + self.n_vocab * self.d_model

    def frequencies(self, factors: torch.Tensor | None) -> list[torch.Tensor]:
        """(rope_dim / 2,) angles a position, for ALL, WINDOWED and NONE."""
        exponents = -torch.arange(0, self.rope_dim, 2, dtype=torch.float32) / self.rope_dim
        everywhere = self.rope_base**exponents
        if factors is not None:
            everywhere = everywhere / factors
        windowed = self.rope_base_windowed**exponents / self.rope_factor_windowed
        spread = everywhere / self.rope_factor
        if self.yarn is not None:
            spread = self._between(spread, everywhere, self.yarn)
        return [spread, windowed, torch.zeros_like(spread)]

    def _between(self, spread: torch.Tensor, own: torch.Tensor, yarn: Yarn) -> torch.Tensor:
        """YaRN: fast dimensions keep their own frequency, slow ones are spread, a ramp between."""

        def dimension(turns: float) -> float:
            reach = yarn.original_context / (turns * 2 * math.pi)
            return self.rope_dim * math.log(reach) / (2 * math.log(self.rope_base))

        low = max(0.0, math.floor(dimension(yarn.fast)))
        high = min(self.rope_dim - 1.0, math.ceil(dimension(yarn.slow)))
        ramp = (torch.arange(len(own)) - low) / max(0.001, high - low)
        share = 1 - ramp.clamp(0, 1)
        return spread * (1 - share) + own * share


class _Metadata:
    """An architecture's own keys, checked to be of the right kind."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._header, self._architecture = header, architecture

    def get(self, key: str) -> object:
        return self._header.metadata.get(f"{self._architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        found = self.get(key)
        found = default if found is None else found
        if not isinstance(found, (int, float)) or not math.isfinite(found):
            raise SuperegoError(
                f"{self._header.path}: metadata key {self._architecture}.{key} is missing or not "
                "one number"
            )
        return found

    def size(self, key: str, default: float | None = None) -> int:
        found = self.number(key, default)
        if not 0 < found < 1 << 24:
            raise SuperegoError(
                f"{self._header.path}: metadata key {self._architecture}.{key} is {found}, "
                "expected a positive size"
            )
        return int(found)


def read_shape(header: Header) -> Shape:
    """Sizes from the metadata; raises SuperegoError for what the walk cannot do."""
    architecture = header.text("general.architecture")
    known = ARCHITECTURES.get(architecture)
    if known is None:
        raise SuperegoError(
            f"{header.path}: base of architecture '{architecture}' is not supported by compile; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    data = _Metadata(header, architecture)
    number, size = data.number, data.size
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise SuperegoError(f"{header.path}: tensor token_embd.weight is missing")
    n_layer, d_model = size("block_count"), size("embedding_length")
    n_head = size("attention.head_count")
    head_dim = size("attention.key_length", d_model // n_head)
    if size("attention.value_length", head_dim) != head_dim:
        raise SuperegoError(f"{header.path}: keys and values of different widths are not supported")
    n_expert = int(number("expert_count", 0))
    if bool(n_expert) != ("ffn_gate_inp" in known.adaptable):
        raise SuperegoError(
            f"{header.path}: '{architecture}' with {n_expert} experts is not supported by compile; "
            "supported mixtures of experts: qwen3moe"
        )
    scaling = str(data.get("rope.scaling.type") or "linear")
    if scaling not in ("none", "linear", "longrope", "yarn"):
        raise SuperegoError(f"{header.path}: rope scaling '{scaling}' is not supported by compile")
    # llama.cpp takes the scale from the newer key or the older one; 0 means none
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if scaling == "none" else factor
    magnitude = number("rope.scaling.attn_factor", 1.0)
    yarn = None
    if scaling == "yarn":
        magnitude *= (1 + 0.1 * math.log(factor)) if factor > 1 else 1.0
        yarn = Yarn(
            size("rope.scaling.original_context_length", size("context_length")),
            number("rope.scaling.yarn_beta_fast", 32.0),
            number("rope.scaling.yarn_beta_slow", 1.0),
        )
    rope_dim, n_head_kv = (
        size("rope.dimension_count", head_dim),
        size("attention.head_count_kv", n_head),
    )
    if rope_dim > head_dim or rope_dim % 2 or n_head % n_head_kv:
        raise SuperegoError(
            f"{header.path}: {n_head} heads, {n_head_kv} of keys, of {head_dim} values, {rope_dim} "
            "of them rotated: these sizes do not fit together"
        )
    windows = layer_windows(header)
    base = number("rope.freq_base", 10000.0)
    logit_scale = number("logit_scale") if known.granite_scales else 1.0
    if base <= 1 or factor <= 0 or not logit_scale:
        raise SuperegoError(
            f"{header.path}: rotary base {base:g}, rope scale {factor:g} and logit scale "
            f"{logit_scale:g}: expected a base above 1 and scales that are not 0"
        )
    follows = known.window_rope_base is None  # windowed layers have the others' base and factor
    return Shape(
        architecture=architecture,
        n_layer=n_layer,
        d_model=d_model,
        d_ff=size("expert_feed_forward_length" if n_expert else "feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        rope_dim=rope_dim,
        rope_base=base,
        rope_base_windowed=number("rope.freq_base_swa", known.window_rope_base or base),
        rope_factor=factor,
        rope_factor_windowed=factor if follows else 1.0,
        rope_magnitude=magnitude,
        rope_pairs=known.rope_pairs,
        yarn=yarn,
        ropes=_ropes(data, known, windows),
        windows=windows,
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        gelu=known.gelu,
        attention_scale=_attention_scale(data, known, n_layer, d_model // n_head, head_dim),
        attention_cap=number("attn_logit_softcapping", known.attention_cap)
        if known.attention_cap
        else 0.0,
        embedding_scale=_granite(data, known, "embedding_scale")
        or (d_model**0.5 if known.embedding_by_width else 1.0),
        residual_scale=_granite(data, known, "residual_scale") or 1.0,
        logit_scale=1 / logit_scale,
        logit_cap=number("final_logit_softcapping", known.logit_cap)
        if known.embedding_by_width
        else 0.0,
        n_expert=n_expert,
        n_expert_used=size("expert_used_count") if n_expert else 0,
        n_vocab=embedding.shape[0],
        context_length=size("context_length"),
    )


def _granite(data: _Metadata, known: Architecture, key: str) -> float:
    """One of granite's scales; 0 where there is none, as llama.cpp reads it."""
    return data.number(key, 0.0) if known.granite_scales else 0.0


def _attention_scale(
    data: _Metadata, known: Architecture, n_layer: int, wide: int, head_dim: int
) -> float:
    own = _granite(data, known, "attention.scale")
    return own or (wide if n_layer == known.wide_layers else head_dim) ** -0.5


def _ropes(data: _Metadata, known: Architecture, windows: tuple[int, ...]) -> tuple[int, ...]:
    """Which rotary frequencies each layer uses."""
    if known.granite_scales and data.get("rope.scaling.finetuned") is False:
        return (NONE,) * len(windows)
    return tuple(
        NONE
        if known.nope_every and (i + 1) % known.nope_every == 0
        else WINDOWED
        if window
        else ALL
        for i, window in enumerate(windows)
    )

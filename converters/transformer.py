"""The base model's forward pass in torch, one layer at a time, weights read from the GGUF.

Knows the arithmetic of Llama-shaped decoders and how GGUF lays their weights out.
Does not know about manifestos, references or adapters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from gguf import dequantize
from gguf.quants import quant_shape_to_byte_shape

from superego.errors import SuperegoError
from superego.gguf_file import Header

SUPPORTED = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a decoder, from the GGUF metadata."""

    architecture: str
    n_layer: int
    d_model: int
    d_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rope_dim: int
    rope_base: float
    rope_factor: float
    rms_eps: float
    n_vocab: int
    context_length: int

    @property
    def n_weights(self) -> int:
        """Weights of the layers and the embedding."""
        attention = self.d_model * self.head_dim * 2 * (self.n_head + self.n_head_kv)
        return (
            self.n_layer * (attention + 3 * self.d_model * self.d_ff) + self.n_vocab * self.d_model
        )


@dataclass
class Layer:
    """One layer's weights; matrices in the compute type, (out, in)."""

    attn_norm: torch.Tensor  # (d_model,)
    qkv: torch.Tensor  # (head_dim · (n_head + 2 n_head_kv), d_model), Q and K rows in half layout
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # (head_dim,)
    k_norm: torch.Tensor | None
    attn_output: torch.Tensor  # (d_model, n_head · head_dim)
    ffn_norm: torch.Tensor  # (d_model,)
    gate_up: torch.Tensor  # (2 d_ff, d_model)
    ffn_down: torch.Tensor  # (d_model, d_ff)


class Base:
    """A base model's GGUF, opened for reading layer by layer."""

    def __init__(self, header: Header, dtype: torch.dtype, resident: bool) -> None:
        self.path = header.path
        self.dtype = dtype
        self.resident = resident
        self._tensors = header.tensors
        self._bytes = np.memmap(header.path, np.uint8, mode="r")
        self.shape = read_shape(header)
        self._layers: dict[int, Layer] = {}
        self.embedding = self._matrix("token_embd.weight")  # (n_vocab, d_model)
        tied = "output.weight" not in self._tensors
        self.output = self.embedding if tied else self._matrix("output.weight")
        self.output_norm = self._vector("output_norm.weight")
        shape = self.shape
        frequencies = shape.rope_base ** (
            -torch.arange(0, shape.rope_dim, 2, dtype=torch.float32) / shape.rope_dim
        )
        if "rope_freqs.weight" in self._tensors:
            frequencies = frequencies / self._vector("rope_freqs.weight")
        self.rope_frequencies = frequencies / shape.rope_factor  # (rope_dim / 2,)

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise SuperegoError(f"{self.path}: tensor {name} is missing")
        raw = self._bytes[tensor.offset : tensor.offset + tensor.n_bytes]
        rows = raw.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.type))
        return dequantize(rows, tensor.type)

    def _matrix(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._array(name))).to(self.dtype)

    def _vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self._array(name), dtype=np.float32))

    def layer(self, index: int) -> Layer:
        """Layer `index`'s weights, dequantized now unless they are kept resident."""
        if index in self._layers:
            return self._layers[index]
        prefix = f"blk.{index}."
        shape = self.shape
        rows = {
            name: torch.from_numpy(self._array(f"{prefix}attn_{name}.weight"))
            for name in ("q", "k", "v")
        }
        biases = None
        if prefix + "attn_q.bias" in self._tensors:
            biases = {name: self._vector(f"{prefix}attn_{name}.bias") for name in ("q", "k", "v")}
        if shape.architecture == "llama":
            # llama.cpp rotates adjacent pairs for this architecture; the half layout is
            # the same rotation after one fixed permutation of rows, and Q·K is unchanged.
            for name in ("q", "k"):
                rows[name] = pairs_to_halves(rows[name], shape.head_dim)
                if biases:
                    biases[name] = pairs_to_halves(biases[name][:, None], shape.head_dim)[:, 0]
        layer = Layer(
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            qkv=torch.cat([rows["q"], rows["k"], rows["v"]]).to(self.dtype),
            qkv_bias=torch.cat([biases["q"], biases["k"], biases["v"]]).to(self.dtype)
            if biases
            else None,
            q_norm=self._vector(prefix + "attn_q_norm.weight")
            if prefix + "attn_q_norm.weight" in self._tensors
            else None,
            k_norm=self._vector(prefix + "attn_k_norm.weight")
            if prefix + "attn_k_norm.weight" in self._tensors
            else None,
            attn_output=self._matrix(prefix + "attn_output.weight"),
            ffn_norm=self._vector(prefix + "ffn_norm.weight"),
            gate_up=torch.cat(
                [self._matrix(prefix + "ffn_gate.weight"), self._matrix(prefix + "ffn_up.weight")]
            ),
            ffn_down=self._matrix(prefix + "ffn_down.weight"),
        )
        if self.resident:
            self._layers[index] = layer
        return layer

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for `positions` (n,), each (n, rope_dim / 2)."""
        angles = positions.to(torch.float32)[:, None] * self.rope_frequencies
        return angles.cos(), angles.sin()

    def logits(self, stream: torch.Tensor) -> torch.Tensor:
        """(n, d_model) residual stream -> (n, n_vocab) logits in the compute type."""
        hidden = rms_norm(stream, self.output_norm, self.shape.rms_eps, self.dtype)
        return F.linear(hidden, self.output)


def pairs_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (n, width) of Q or K as the GGUF of a `llama` has them -> half layout."""
    n, width = rows.shape
    return rows.view(n // head_dim, head_dim // 2, 2, width).transpose(1, 2).reshape(n, width)


def halves_to_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `pairs_to_halves`."""
    n, width = rows.shape
    return rows.view(n // head_dim, 2, head_dim // 2, width).transpose(1, 2).reshape(n, width)


def read_shape(header: Header) -> Shape:
    """Sizes from the metadata; raises SuperegoError for what the walk cannot do."""
    value = header.metadata.get
    architecture = str(value("general.architecture"))
    if architecture not in SUPPORTED:
        raise SuperegoError(
            f"{header.path}: base of architecture '{architecture}' is not supported by compile; "
            f"supported: {', '.join(SUPPORTED)}"
        )
    scaling = value(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise SuperegoError(f"rope scaling '{scaling}' is not supported by compile")

    def number(key: str, default: float | None = None) -> float:
        found = value(f"{architecture}.{key}", default)
        if not isinstance(found, (int, float)):
            raise SuperegoError(f"metadata key {architecture}.{key} is missing or not one number")
        return found

    d_model, n_head = int(number("embedding_length")), int(number("attention.head_count"))
    head_dim = int(number("attention.key_length", d_model // n_head))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise SuperegoError("tensor token_embd.weight is missing")
    return Shape(
        architecture=architecture,
        n_layer=int(number("block_count")),
        d_model=d_model,
        d_ff=int(number("feed_forward_length")),
        n_head=n_head,
        n_head_kv=int(number("attention.head_count_kv", n_head)),
        head_dim=head_dim,
        rope_dim=int(number("rope.dimension_count", head_dim)),
        rope_base=number("rope.freq_base", 10000.0),
        rope_factor=number("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0,
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        n_vocab=embedding.shape[0],
        context_length=int(number("context_length")),
    )


def probe_dtype() -> tuple[torch.dtype, float]:
    """The faster of bfloat16 and float32 for this machine's matmuls, and its GFLOP/s."""
    best, best_rate = torch.float32, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        F.linear(a, b)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(a, b)
            seconds.append(time.perf_counter() - start)
        rate = 2 * 1024 * 576 * 1536 / sorted(seconds)[2] / 1e9
        if rate > best_rate * 1.2:  # bfloat16 must win clearly: it costs precision
            best, best_rate = dtype, rate
    return best, best_rate


def rms_norm(
    stream: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Root-mean-square norm of the last axis, computed in float32, returned as `dtype`."""
    # written out: three times as fast on CPU as F.rms_norm
    scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    return (stream * scale * weight).to(dtype)


class Rows:
    """Packed rows of many sequences that all continue one shared prefix.

    Sequence i owns `lengths[i]` consecutive rows. Rows are attended to in chunks of
    whole sequences, padded to the longest of the chunk: give them sorted by length.
    """

    def __init__(self, lengths: list[int], prefix_length: int, chunk_rows: int = 4096) -> None:
        self.lengths = lengths
        self.prefix_length = prefix_length
        self.total = sum(lengths)
        within = torch.cat([torch.arange(n) for n in lengths])
        self.positions = within + prefix_length  # (total,)
        self.chunks: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        first, start = 0, 0
        while first < len(lengths):
            last, widest, rows = first, 0, 0
            while last < len(lengths):
                widest = max(widest, lengths[last])
                if last > first and widest * (last - first + 1) > chunk_rows:
                    break
                rows += lengths[last]
                last += 1
            widest = max(lengths[first:last])
            gather = torch.zeros(last - first, widest, dtype=torch.long)
            real = torch.zeros(last - first, widest, dtype=torch.bool)
            offset = 0
            for i, n in enumerate(lengths[first:last]):
                gather[i, :n] = torch.arange(offset, offset + n)
                real[i, :n] = True
                offset += n
            scatter = real.flatten().nonzero()[:, 0]  # padded position of each row
            self.chunks.append((start, start + rows, gather, scatter))
            start += rows
            first = last


@dataclass
class KeyValue:
    """Keys (rotated) and values of a prefix, each (n_head_kv, length, head_dim)."""

    key: torch.Tensor
    value: torch.Tensor


def project_qkv(
    base: Base, layer: Layer, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, d_model) -> Q (n, n_head, head_dim), K and V (n, n_head_kv, head_dim), rotated."""
    shape = base.shape
    projected = F.linear(hidden, layer.qkv, layer.qkv_bias)
    heads = projected.view(hidden.shape[0], -1, shape.head_dim)
    query, key, value = heads.split([shape.n_head, shape.n_head_kv, shape.n_head_kv], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        query = rms_norm(query.float(), layer.q_norm, shape.rms_eps, base.dtype)
        key = rms_norm(key.float(), layer.k_norm, shape.rms_eps, base.dtype)
    cos, sin = rotation
    return rotate(query, cos, sin, shape), rotate(key, cos, sin, shape), value


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rotary positions on (n, heads, head_dim) in half layout; cos, sin: (n, rope_dim / 2)."""
    half = shape.rope_dim // 2
    cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if shape.rope_dim < shape.head_dim:
        parts.append(heads[..., 2 * half :])
    return torch.cat(parts, dim=-1)


def attend(
    base: Base,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    prefix: KeyValue | None,
) -> torch.Tensor:
    """Causal attention of packed rows over the prefix and themselves -> (n, n_head·head_dim)."""
    out = []
    for start, stop, gather, scatter in rows.chunks:
        batch, width = gather.shape
        q = query[start:stop][gather].transpose(1, 2)  # (batch, n_head, width, head_dim)
        k = key[start:stop][gather].transpose(1, 2)  # (batch, n_head_kv, width, head_dim)
        v = value[start:stop][gather].transpose(1, 2)
        mask = torch.ones(width, width, dtype=torch.bool).tril()
        if prefix is not None:
            k = torch.cat([prefix.key.expand(batch, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix.value.expand(batch, -1, -1, -1), v], dim=2)
            seen = torch.ones(width, prefix.key.shape[1], dtype=torch.bool)
            mask = torch.cat([seen, mask], dim=1)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out.append(a.transpose(1, 2).reshape(batch * width, -1)[scatter])
    return torch.cat(out)


def feed_forward(base: Base, layer: Layer, stream: torch.Tensor) -> torch.Tensor:
    """(n, d_model) residual stream -> (n, d_ff) inputs of ffn_down."""
    hidden = rms_norm(stream, layer.ffn_norm, base.shape.rms_eps, base.dtype)
    gate, up = F.linear(hidden, layer.gate_up).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

"""The base model's forward pass in torch, one layer at a time, weights read from the GGUF.

Knows the arithmetic of decoders (see superego.architectures for which) and how GGUF lays their
weights out. Does not know about manifestos, references or adapters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from superego.converters.shape import Shape, read_shape
from superego.errors import SuperegoError
from superego.gguf_file import Header, read_tensor

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (n, rope_dim / 2)


@dataclass
class Write:
    """A matrix that writes to the residual stream, with what lies between it and the stream."""

    weight: torch.Tensor | None  # (d_model, in); None: what is written comes ready (experts)
    bias: torch.Tensor | None = None  # (d_model,)
    norm: torch.Tensor | None = None  # (d_model,), of an RMS norm behind the matrix
    eps: float = 0.0  # of that norm
    scale: float = 1.0

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, in) -> (n, d_model), before norm and scale."""
        return inputs if self.weight is None else F.linear(inputs, self.weight, self.bias)

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """What a product adds to the stream."""
        if self.norm is not None:
            product = rms_norm(product.float(), self.norm, self.eps, torch.float32)
        return product if self.scale == 1 else product.float() * self.scale

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.finish(self.product(inputs))


@dataclass
class Layer:
    """One layer's weights; matrices in the compute type, (out, in)."""

    index: int
    attn_norm: torch.Tensor  # (d_model,)
    qkv: torch.Tensor  # (head_dim · (n_head + 2 n_head_kv), d_model), Q and K rows in half layout
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # (head_dim,)
    k_norm: torch.Tensor | None
    attn_output: Write  # (d_model, n_head · head_dim)
    ffn_norm: torch.Tensor  # (d_model,)
    gate_up: torch.Tensor  # (2 d_ff, d_model); with experts (n_expert, 2 d_ff, d_model)
    gate_up_bias: torch.Tensor | None
    ffn_down: Write  # (d_model, d_ff)
    router: torch.Tensor | None = None  # (n_expert, d_model)
    down_experts: torch.Tensor | None = None  # (n_expert, d_model, d_ff)


class Base:
    """A base model's GGUF, opened for reading layer by layer."""

    def __init__(self, header: Header, dtype: torch.dtype, resident: bool) -> None:
        self.path = header.path
        self.dtype = dtype
        self.resident = resident
        self._tensors = header.tensors
        self.shape = read_shape(header)
        self._layers: dict[int, Layer] = {}
        self.embedding = self._matrix("token_embd.weight")  # (n_vocab, d_model)
        tied = "output.weight" not in self._tensors
        self.output = self.embedding if tied else self._matrix("output.weight")
        self.output_bias = self._optional("output.bias")
        self.output_norm = self._vector("output_norm.weight")
        factors = next(
            # of the two sets of longrope, llama.cpp takes the short one up to the original context
            (n for n in ("rope_freqs.weight", "rope_factors_short.weight") if n in self._tensors),
            None,
        )
        self._frequencies = self.shape.frequencies(self._vector(factors) if factors else None)

    @property
    def plain(self) -> bool:
        """Whether attention is over everything, uncapped, from matrices of their own: what the
        slot and compaction, which rewrite single keys and values, are made for."""
        shape = self.shape
        return not (
            shape.attention_cap
            or any(shape.windows)
            or shape.n_expert
            or "blk.0.attn_q.weight" not in self._tensors
            or "blk.0.ffn_gate.weight" not in self._tensors
        )

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise SuperegoError(f"{self.path}: tensor {name} is missing")
        # torch takes only arrays that may be written to
        return np.require(read_tensor(tensor), requirements=["C", "W"])

    def _matrix(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._array(name)).to(self.dtype)

    def _vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._array(name).astype(np.float32))

    def _optional(self, name: str) -> torch.Tensor | None:
        return self._vector(name) if name in self._tensors else None

    def _joined(
        self, prefix: str, whole: str, parts: dict[str, int], kind: str
    ) -> torch.Tensor | None:
        """One matrix or vector of several, however the file stores it: `parts` gives its rows.

        Those of attn_q and attn_k come in half layout. None where the file has none of them.
        """
        if f"{prefix}{whole}.{kind}" in self._tensors:
            rows = torch.from_numpy(self._array(f"{prefix}{whole}.{kind}"))
            found = list(rows.split(list(parts.values())))
        elif any(f"{prefix}{name}.{kind}" in self._tensors for name in parts):
            found = [torch.from_numpy(self._array(f"{prefix}{name}.{kind}")) for name in parts]
        else:
            return None
        if self.shape.rope_pairs:
            # llama.cpp rotates adjacent pairs for this architecture; the half layout is
            # the same rotation after one fixed permutation of rows, and Q·K is unchanged.
            found = [
                pairs_to_halves(rows.view(len(rows), -1), self.shape.head_dim).view_as(rows)
                if name in ("attn_q", "attn_k")
                else rows
                for name, rows in zip(parts, found, strict=True)
            ]
        return torch.cat(found).to(self.dtype)

    def layer(self, index: int) -> Layer:
        """Layer `index`'s weights, dequantized now unless they are kept resident."""
        if index not in self._layers:
            try:
                layer = self._read_layer(index)
            except RuntimeError as error:  # matrices whose shapes do not fit together
                raise SuperegoError(
                    f"{self.path}: the tensors of layer {index} do not fit its metadata: {error}"
                ) from None
            if not self.resident:
                self._layers.clear()  # the last one read stays: it is asked for again and again
            self._layers[index] = layer
        return self._layers[index]

    def _read_layer(self, index: int) -> Layer:
        prefix = f"blk.{index}."
        shape = self.shape
        heads = {"attn_q": shape.n_head, "attn_k": shape.n_head_kv, "attn_v": shape.n_head_kv}
        widths = {name: n * shape.head_dim for name, n in heads.items()}
        qkv = self._joined(prefix, "attn_qkv", widths, "weight")
        if qkv is None:
            raise SuperegoError(f"{self.path}: tensor {prefix}attn_q.weight is missing")
        both = {"ffn_gate": shape.d_ff, "ffn_up": shape.d_ff}
        layer = Layer(
            index=index,
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            qkv=qkv,
            qkv_bias=self._joined(prefix, "attn_qkv", widths, "bias"),
            q_norm=self._optional(prefix + "attn_q_norm.weight"),
            k_norm=self._optional(prefix + "attn_k_norm.weight"),
            attn_output=self._write(prefix, "attn_output", "post_attention_norm"),
            ffn_norm=self._vector(prefix + "ffn_norm.weight"),
            gate_up=torch.empty(0),
            gate_up_bias=None,
            ffn_down=Write(None, scale=shape.residual_scale),
        )
        if shape.n_expert:
            layer.router = self._vector(prefix + "ffn_gate_inp.weight")
            layer.gate_up = torch.cat(
                [self._matrix(f"{prefix}ffn_{name}_exps.weight") for name in ("gate", "up")], dim=1
            )
            layer.down_experts = self._matrix(prefix + "ffn_down_exps.weight")
        else:
            fused = prefix + "ffn_gate.weight" not in self._tensors  # gate rows, then up rows
            layer.gate_up = (
                self._matrix(prefix + "ffn_up.weight")
                if fused
                else torch.cat([self._matrix(f"{prefix}{name}.weight") for name in both])
            )
            layer.gate_up_bias = self._joined(prefix, "ffn_gate_up", both, "bias")
            layer.ffn_down = self._write(prefix, "ffn_down", "post_ffw_norm")
        return layer

    def _write(self, prefix: str, name: str, norm: str) -> Write:
        bias = self._optional(f"{prefix}{name}.bias")
        return Write(
            weight=self._matrix(f"{prefix}{name}.weight"),
            bias=None if bias is None else bias.to(self.dtype),
            norm=self._optional(f"{prefix}{norm}.weight"),
            eps=self.shape.rms_eps,
            scale=self.shape.residual_scale,
        )

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) tokens -> (n, d_model) float32, the stream before the first layer."""
        stream = self.embedding[tokens].float()
        scale = self.shape.embedding_scale
        return stream if scale == 1 else stream.mul_(scale)

    def rotation(self, positions: torch.Tensor, index: int, turn: bool = False) -> Rotation:
        """Layer `index`'s cosines and sines for `positions` (n,), each (n, rope_dim / 2).

        With `turn`, those that move what is rotated already.
        """
        angles = positions.to(torch.float32)[:, None] * self._frequencies[self.shape.ropes[index]]
        if turn or self.shape.rope_magnitude == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * self.shape.rope_magnitude, angles.sin() * self.shape.rope_magnitude

    def rotations(self, positions: torch.Tensor) -> list[Rotation]:
        """`rotation` of every layer; layers with the same frequencies share theirs."""
        ropes = self.shape.ropes
        made = {rope: self.rotation(positions, ropes.index(rope)) for rope in set(ropes)}
        return [made[rope] for rope in ropes]

    def logits(self, stream: torch.Tensor) -> torch.Tensor:
        """(n, d_model) residual stream -> (n, n_vocab) logits in the compute type."""
        hidden = rms_norm(stream, self.output_norm, self.shape.rms_eps, self.dtype)
        logits = F.linear(hidden, self.output)
        if self.output_bias is not None:
            logits = logits + self.output_bias
        if self.shape.logit_scale != 1:
            logits = logits * self.shape.logit_scale
        return capped(logits, self.shape.logit_cap)


def capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores bent to stay within ± cap; 0 leaves them as they are."""
    return (scores / cap).tanh() * cap if cap else scores


def pairs_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (n, width) of Q or K as GGUF has those of `rope_pairs` -> half layout."""
    n, width = rows.shape
    return rows.view(n // head_dim, head_dim // 2, 2, width).transpose(1, 2).reshape(n, width)


def halves_to_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `pairs_to_halves`."""
    n, width = rows.shape
    return rows.view(n // head_dim, 2, head_dim // 2, width).transpose(1, 2).reshape(n, width)


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
    base: Base, layer: Layer, hidden: torch.Tensor, rotation: Rotation
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
    layer: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    prefix: KeyValue | None,
) -> torch.Tensor:
    """Causal attention of packed rows over the prefix and themselves -> (n, n_head·head_dim)."""
    shape, out = base.shape, []
    window = shape.windows[layer.index]
    for start, stop, gather, scatter in rows.chunks:
        batch, width = gather.shape
        q = query[start:stop][gather].transpose(1, 2)  # (batch, n_head, width, head_dim)
        k = key[start:stop][gather].transpose(1, 2)  # (batch, n_head_kv, width, head_dim)
        v = value[start:stop][gather].transpose(1, 2)
        if prefix is not None:
            k = torch.cat([prefix.key.expand(batch, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix.value.expand(batch, -1, -1, -1), v], dim=2)
        ahead = k.shape[2] - width
        mask = torch.ones(width, ahead + width, dtype=torch.bool).tril(ahead)
        if window:  # a token sees itself and the window - 1 before it
            mask = mask.triu(ahead - window + 1)
        if shape.attention_cap:
            a = _capped_attention(q, k, v, mask, shape)
        else:
            a = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=shape.attention_scale, enable_gqa=True
            )
        out.append(a.transpose(1, 2).reshape(batch * width, -1)[scatter])
    return torch.cat(out)


def _capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """As scaled_dot_product_attention with enable_gqa, with the scores' soft cap."""
    group = shape.n_head // shape.n_head_kv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = capped((q @ k.transpose(2, 3)).float() * shape.attention_scale, shape.attention_cap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def feed_forward(base: Base, layer: Layer, stream: torch.Tensor) -> torch.Tensor:
    """(n, d_model) residual stream -> (n, d_ff) inputs of ffn_down.

    Of a layer with experts their weighted outputs, (n, d_model).
    """
    hidden = rms_norm(stream, layer.ffn_norm, base.shape.rms_eps, base.dtype)
    if layer.router is not None and layer.down_experts is not None:
        return _experts(base, layer, hidden, layer.router, layer.down_experts)
    return gated(base, F.linear(hidden, layer.gate_up, layer.gate_up_bias))


def gated(base: Base, gate_up: torch.Tensor) -> torch.Tensor:
    """(n, 2 d_ff) products of gate and up -> (n, d_ff)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if base.shape.gelu else F.silu(gate)).mul_(up)


def _experts(
    base: Base, layer: Layer, hidden: torch.Tensor, router: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Each row through the experts that the router gives it most for, weighted by their shares."""
    shares, chosen = F.linear(hidden.float(), router).softmax(-1).topk(base.shape.n_expert_used)
    shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros(hidden.shape)
    for expert in chosen.unique().tolist():
        row, place = (chosen == expert).nonzero(as_tuple=True)
        inner = gated(base, F.linear(hidden[row], layer.gate_up[expert]))
        out[row] += F.linear(inner, down[expert]) * shares[row, place, None]
    return out

"""The base model's forward pass in torch, one layer at a time, weights read from the GGUF.

Knows the arithmetic of decoders (see superego.architectures for which) and how GGUF lays their
weights out. Does not know about manifestos, references or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from superego.converters.products import FEW, Light, has_light, linear, to_light_
from superego.converters.shape import Shape, read_shape
from superego.converters.weights import Weights
from superego.errors import SuperegoError
from superego.gguf_file import Header

_MATRICES = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
WHOLE_TABLE, TABLE_PART = 1 << 27, 1 << 26  # weights of an output matrix multiplied at once
# Rows treated at once. What lies between two matrices then is less than what malloc asks the
# system for (32 MB), gives back, and gets zeroed anew for the next product.
CHUNK = 2048
_GATED = 1 << 22  # products of gate and up at once, but of no fewer rows than these
_LEAST_GATED = 1024
_NORMED = 1 << 20  # values normed at once, in a cache

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (n, rope_dim / 2)


@dataclass
class Write:
    """A matrix that writes to the residual stream, with what lies between it and the stream."""

    weight: torch.Tensor | None  # (d_model, in); None: what is written comes ready (experts)
    bias: torch.Tensor | None = None  # (d_model,)
    norm: torch.Tensor | None = None  # (d_model,), of an RMS norm behind the matrix
    eps: float = 0.0  # of that norm
    scale: float = 1.0
    light: Light | None = None  # the matrix, where only few rows come

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, in) -> (n, d_model), before norm and scale."""
        if self.light is not None:
            return self.light.linear(inputs, self.bias)
        return inputs if self.weight is None else _linear_in(inputs, self.weight, self.bias)

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
    light_qkv: Light | None = None  # matrices where only few rows come
    light_gate_up: Light | None = None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d_model), normed -> queries, keys and values, (n, rows of `qkv`)."""
        if self.light_qkv is not None:
            return self.light_qkv.linear(hidden, self.qkv_bias)
        return _linear_in(hidden, self.qkv, self.qkv_bias)

    def gate_and_up(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d_model), normed -> products of gate and up, (n, 2 d_ff)."""
        if self.light_gate_up is not None:
            return self.light_gate_up.linear(hidden, self.gate_up_bias)
        return _linear_in(hidden, self.gate_up, self.gate_up_bias)

    def lightened(self) -> Layer:
        """The same with light matrices, for few rows."""

        def light(write: Write) -> Write:
            return write if write.weight is None else replace(write, light=Light(write.weight))

        return replace(
            self,
            light_qkv=Light(self.qkv),
            attn_output=light(self.attn_output),
            light_gate_up=Light(self.gate_up) if self.down_experts is None else None,
            ffn_down=light(self.ffn_down),
        )

    def to_light_(self) -> None:
        """Round the matrices in place to what light ones have."""
        writes = [self.attn_output.weight, self.ffn_down.weight]
        gate_up = self.gate_up if self.down_experts is None else None
        for weight in (self.qkv, gate_up, *writes):
            if weight is not None:
                to_light_(weight)


class Base:
    """A base model's GGUF, opened for reading layer by layer.

    What is kept in memory changes nothing of what is computed: neither its type nor its order.
    """

    def __init__(self, header: Header, dtype: torch.dtype, resident: bool) -> None:
        """`resident`: keep all that is read; else the last layer alone (see also `keep`)."""
        self.path = header.path
        self.dtype = dtype
        self.device = torch.get_default_device()  # see superego.converters.device
        self.shape = read_shape(header)
        self.weights = Weights(header, dtype)
        self._layers: dict[int, Layer] = {}
        self._light: dict[int, Layer] = {}  # of layers that are kept, for few rows
        self._passing: dict[str, torch.Tensor] = {}  # buffers of layers that are not kept
        self._tables: dict[str, torch.Tensor] = {}
        self._tied = "output.weight" not in self.weights
        self.keep(self.shape.n_layer if resident else 0, tables=resident)
        for name in ("token_embd.weight", "output.weight"):
            if resident and name in self.weights:
                self._table(name)
        self.output_bias = self._optional("output.bias")
        self.output_norm = self._vector("output_norm.weight")
        factors = next(
            # of the two sets of longrope, llama.cpp takes the short one up to the original context
            (n for n in ("rope_freqs.weight", "rope_factors_short.weight") if n in self.weights),
            None,
        )
        self._frequencies = self.shape.frequencies(self._vector(factors) if factors else None)

    def keep(self, layers: int, tables: bool) -> None:
        """Keep the first `layers` layers and the tables from when they are next read on.

        What is kept beyond that is let go.
        """
        self._kept, self._kept_tables = layers, tables
        self._layers = {i: layer for i, layer in self._layers.items() if i < layers}
        self._passing.clear()
        if not tables:
            self._tables.clear()

    @property
    def resident(self) -> bool:
        """Whether all weights are kept."""
        return self._kept >= self.shape.n_layer and self._kept_tables

    @property
    def plain(self) -> bool:
        """Whether attention is over everything, uncapped, from matrices of their own: what the
        slot and compaction, which rewrite single keys and values, are made for."""
        shape = self.shape
        return not (
            shape.attention_cap
            or any(shape.windows)
            or shape.n_expert
            or "blk.0.attn_q.weight" not in self.weights
            or "blk.0.ffn_gate.weight" not in self.weights
        )

    @property
    def separate(self) -> bool:
        """Whether every matrix of a layer stands by itself: no experts, nothing fused."""
        names = ("blk.0.attn_q.weight", "blk.0.ffn_gate.weight")
        return not self.shape.n_expert and all(name in self.weights for name in names)

    @property
    def embedding(self) -> torch.Tensor:
        """(n_vocab, d_model), read now where it is not kept."""
        return self._table("token_embd.weight")

    @property
    def output(self) -> torch.Tensor:
        """(n_vocab, d_model), read now where it is not kept."""
        return self.embedding if self._tied else self._table("output.weight")

    @output.setter
    def output(self, table: torch.Tensor) -> None:
        self._tied = False
        self._tables["output.weight"] = table

    def _table(self, name: str) -> torch.Tensor:
        if name in self._tables:
            return self._tables[name]
        table = self._matrix(name)
        if self._kept_tables:
            self._tables[name] = table
        return table

    def _matrix(
        self, name: str, out: torch.Tensor | None = None, rows: slice | None = None
    ) -> torch.Tensor:
        return self.weights.matrix(name, out, rows).to(self.device)

    def _vector(self, name: str) -> torch.Tensor:
        return self.weights.vector(name).to(self.device)

    def _optional(self, name: str) -> torch.Tensor | None:
        return self._vector(name) if name in self.weights else None

    def _space(self, name: str, shape: tuple[int, ...], passing: bool) -> torch.Tensor:
        """Memory for a matrix; a passing layer's is that of the one before it."""
        found = self._passing.get(name) if passing else None
        if found is None or found.shape != shape:
            found = torch.empty(shape, dtype=self.dtype, device="cpu")
            if passing:
                self._passing[name] = found
        return found

    def _qkv(self, prefix: str, parts: dict[str, int], passing: bool) -> torch.Tensor:
        """Q, K and V rows in one matrix, however the file stores them: `parts` gives its rows.

        Those of attn_q and attn_k come in half layout.
        """
        shape = self.shape
        found = self._space("qkv", (sum(parts.values()), shape.d_model), passing)
        pieces = found.split(list(parts.values()))
        if f"{prefix}attn_qkv.weight" in self.weights:
            self.weights.matrix(f"{prefix}attn_qkv.weight", found)
        else:
            for name, rows in zip(parts, pieces, strict=True):
                self.weights.matrix(f"{prefix}{name}.weight", rows)
        if shape.rope_pairs:
            # llama.cpp rotates adjacent pairs for this architecture; the half layout is
            # the same rotation after one fixed permutation of rows, and Q·K is unchanged.
            for rows in pieces[:2]:
                rows.copy_(pairs_to_halves(rows, shape.head_dim))
        return found.to(self.device)

    def _bias(self, prefix: str, whole: str, parts: dict[str, int]) -> torch.Tensor | None:
        """One vector of several, as `_qkv`. None where the file has none of them."""
        if f"{prefix}{whole}.bias" in self.weights:
            found = list(self._vector(f"{prefix}{whole}.bias").split(list(parts.values())))
        elif any(f"{prefix}{name}.bias" in self.weights for name in parts):
            found = [self._vector(f"{prefix}{name}.bias") for name in parts]
        else:
            return None
        if self.shape.rope_pairs:
            found = [
                pairs_to_halves(rows[:, None], self.shape.head_dim)[:, 0]
                if name in ("attn_q", "attn_k")
                else rows
                for name, rows in zip(parts, found, strict=True)
            ]
        return torch.cat(found).to(self.dtype)

    def layer(self, index: int, passing: bool = False) -> Layer:
        """Layer `index`'s weights, dequantized now unless they are kept.

        A `passing` layer that is not kept is good until the next one is read: its memory is
        used again. Raises SuperegoError where its tensors do not fit the metadata.
        """
        if index in self._layers:
            return self._layers[index]
        passing = passing and index >= self._kept
        try:
            layer = self._read_layer(index, passing)
        except RuntimeError as error:  # matrices whose shapes do not fit together
            raise SuperegoError(
                f"{self.path}: the tensors of layer {index} do not fit its metadata: {error}"
            ) from None
        if not passing:
            for other in [i for i in self._layers if i >= self._kept]:
                del self._layers[other]  # the last one read stays: it is asked for again and again
            self._layers[index] = layer
        following = (index + 1) % self.shape.n_layer
        if following not in self._layers:
            start = f"blk.{following}."
            self.weights.announce(start + name + ".weight" for name in _MATRICES)
        return layer

    def layer_for(self, index: int, rows: int) -> Layer:
        """As a passing `layer`, for so many rows: with light matrices where these are quicker.

        Until `let_go_of_light` they lie in memory beside the layers that are kept.
        """
        if rows > FEW or not has_light(self.dtype, self.device):
            return self.layer(index, passing=True)
        if not self._light and self._layers:  # each is packed by one thread
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                packed = pool.map(Layer.lightened, self._layers.values())
                self._light = dict(zip(self._layers, packed, strict=True))
        if index in self._light:
            return self._light[index]
        layer = self.layer(index, passing=True)
        if index in self._layers:
            return layer.lightened()
        layer.to_light_()  # packing it for one product would take longer
        return layer

    def let_go_of_light(self) -> None:
        """Free the light matrices; they are made again when they are asked for."""
        self._light.clear()

    def _read_layer(self, index: int, passing: bool) -> Layer:
        shape, prefix = self.shape, f"blk.{index}."
        heads = {"attn_q": shape.n_head, "attn_k": shape.n_head_kv, "attn_v": shape.n_head_kv}
        widths = {name: n * shape.head_dim for name, n in heads.items()}
        both = {"ffn_gate": shape.d_ff, "ffn_up": shape.d_ff}
        layer = Layer(
            index=index,
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            qkv=self._qkv(prefix, widths, passing),
            qkv_bias=self._bias(prefix, "attn_qkv", widths),
            q_norm=self._optional(prefix + "attn_q_norm.weight"),
            k_norm=self._optional(prefix + "attn_k_norm.weight"),
            attn_output=self._write(prefix, "attn_output", "post_attention_norm", passing),
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
            layer.gate_up = self._space("gate_up", (2 * shape.d_ff, shape.d_model), passing)
            if prefix + "ffn_gate.weight" in self.weights:
                for name, rows in zip(both, layer.gate_up.split(shape.d_ff), strict=True):
                    self.weights.matrix(f"{prefix}{name}.weight", rows)
            else:  # fused: gate rows, then up rows
                self.weights.matrix(prefix + "ffn_up.weight", layer.gate_up)
            layer.gate_up = layer.gate_up.to(self.device)
            layer.gate_up_bias = self._bias(prefix, "ffn_gate_up", both)
            layer.ffn_down = self._write(prefix, "ffn_down", "post_ffw_norm", passing)
        return layer

    def _write(self, prefix: str, name: str, norm: str, passing: bool) -> Write:
        shape = self.weights.info(f"{prefix}{name}.weight").shape
        bias = self._optional(f"{prefix}{name}.bias")
        return Write(
            weight=self._matrix(f"{prefix}{name}.weight", self._space(name, shape, passing)),
            bias=None if bias is None else bias.to(self.dtype),
            norm=self._optional(f"{prefix}{norm}.weight"),
            eps=self.shape.rms_eps,
            scale=self.shape.residual_scale,
        )

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) tokens -> (n, d_model) float32, the stream before the first layer."""
        name = "token_embd.weight"
        if self._kept_tables or name in self._tables:
            stream = self.embedding[tokens].float()
        else:
            stream = self.weights.gathered(name, tokens.tolist()).to(self.device).float()
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

    def _output_parts(self) -> Iterator[torch.Tensor]:
        """The output matrix, a large one in runs of rows, the same ones whether it is kept."""
        n_vocab, width = self.shape.n_vocab, self.shape.d_model
        step = n_vocab if n_vocab * width <= WHOLE_TABLE else TABLE_PART // width
        name = "token_embd.weight" if self._tied else "output.weight"
        kept = self.output if self._kept_tables or name in self._tables else None
        for start in range(0, n_vocab, step):
            rows = slice(start, min(start + step, n_vocab))
            if kept is not None:
                yield kept[rows]
            else:
                shape = (rows.stop - start, width)
                yield self._matrix(name, self._space(f"output {shape}", shape, True), rows)

    def logits(self, stream: torch.Tensor) -> torch.Tensor:
        """(n, d_model) residual stream -> (n, n_vocab) logits in the compute type."""
        hidden = rms_norm(stream, self.output_norm, self.shape.rms_eps, self.dtype)
        parts = [linear(hidden, rows) for rows in self._output_parts()]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.output_bias is not None:
            logits = logits + self.output_bias
        if self.shape.logit_scale != 1:
            logits = logits * self.shape.logit_scale
        return capped(logits, self.shape.logit_cap)


def _linear_in(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `linear`, in the rows' type: a matrix of another one is turned into it."""
    return linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


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


def rms_norm(
    stream: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Root-mean-square norm of the last axis, computed in float32, returned as `dtype`."""
    step = max(1, _NORMED * len(stream) // max(1, stream.numel()))
    if len(stream) <= step:
        return _rms_norm(stream, weight, eps, dtype)
    out = torch.empty(stream.shape, dtype=dtype)
    for start in range(0, len(stream), step):
        out[start : start + step] = _rms_norm(stream[start : start + step], weight, eps, dtype)
    return out


def _rms_norm(
    stream: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    # written out: three times as fast on CPU as F.rms_norm
    scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    return (stream * scale * weight).to(dtype)


class Rows:
    """Packed rows of many sequences that all continue one shared prefix.

    Sequence i owns `lengths[i]` consecutive rows. Rows are attended to in chunks of
    whole sequences, padded to the longest of the chunk: give them sorted by length.
    """

    def __init__(self, lengths: list[int], prefix_length: int, chunk_rows: int = CHUNK) -> None:
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
    projected = layer.project(hidden)
    heads = projected.view(hidden.shape[0], -1, shape.head_dim)
    query, key, value = heads.split([shape.n_head, shape.n_head_kv, shape.n_head_kv], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        query = rms_norm(query.float(), layer.q_norm, shape.rms_eps, hidden.dtype)
        key = rms_norm(key.float(), layer.k_norm, shape.rms_eps, hidden.dtype)
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
    found = [
        _attend(base, layer, query[a:b], key[a:b], value[a:b], gather, scatter, prefix)
        for a, b, gather, scatter in rows.chunks
    ]
    return torch.cat(found) if len(found) > 1 else found[0]


def attention(
    base: Base,
    layer: Layer,
    stream: torch.Tensor,
    rows: Rows,
    rotation: Rotation,
    prefix: KeyValue | None,
) -> torch.Tensor:
    """(n, d_model) residual stream of packed rows -> (n, n_head·head_dim), what attn_output reads.

    As norm, `project_qkv` and `attend`, a chunk of rows after the other.
    """
    shape, (cos, sin) = base.shape, rotation
    out = torch.empty(len(stream), shape.n_head * shape.head_dim, dtype=base.dtype)
    for a, b, gather, scatter in rows.chunks:
        hidden = rms_norm(stream[a:b], layer.attn_norm, shape.rms_eps, base.dtype)
        projected = project_qkv(base, layer, hidden, (cos[a:b], sin[a:b]))
        out[a:b] = _attend(base, layer, *projected, gather, scatter, prefix)
    return out


def _attend(
    base: Base,
    layer: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gather: torch.Tensor,
    scatter: torch.Tensor,
    prefix: KeyValue | None,
) -> torch.Tensor:
    """As `attend`, of the rows of one chunk."""
    shape, window = base.shape, base.shape.windows[layer.index]
    batch, width = gather.shape
    q = query[gather].transpose(1, 2)  # (batch, n_head, width, head_dim)
    k = key[gather].transpose(1, 2)  # (batch, n_head_kv, width, head_dim)
    v = value[gather].transpose(1, 2)
    if prefix is not None:
        k = torch.cat([prefix.key.expand(batch, -1, -1, -1), k], dim=2)
        v = torch.cat([prefix.value.expand(batch, -1, -1, -1), v], dim=2)
    ahead = k.shape[2] - width
    mask = torch.ones(width, ahead + width, dtype=torch.bool).tril(ahead)
    if window:  # a token sees itself and the window - 1 before it
        mask = mask.triu(ahead - window + 1)
    if shape.attention_cap:
        found = _capped_attention(q, k, v, mask, shape)
    else:
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=shape.attention_scale, enable_gqa=True
        )
    return found.transpose(1, 2).reshape(batch * width, -1)[scatter]


def _capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """As scaled_dot_product_attention with enable_gqa, with the scores' soft cap."""
    group = shape.n_head // shape.n_head_kv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = capped((q @ k.transpose(2, 3)).float() * shape.attention_scale, shape.attention_cap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def feed_forward(
    base: Base, layer: Layer, stream: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(n, d_model) residual stream -> (n, d_ff) inputs of ffn_down, in `dtype` or the base's.

    Of a layer with experts their weighted outputs, (n, d_model).
    """
    eps, dtype = base.shape.rms_eps, dtype or base.dtype
    if layer.router is not None and layer.down_experts is not None:
        hidden = rms_norm(stream, layer.ffn_norm, eps, dtype)
        return _experts(base, layer, hidden, layer.router, layer.down_experts)

    def inner(rows: torch.Tensor) -> torch.Tensor:
        hidden = rms_norm(rows, layer.ffn_norm, eps, dtype)
        return gated(base, layer.gate_and_up(hidden))

    step = gated_rows(base.shape)
    if len(stream) <= step:
        return inner(stream)
    out = torch.empty(len(stream), base.shape.d_ff, dtype=dtype)
    for start in range(0, len(stream), step):
        out[start : start + step] = inner(stream[start : start + step])
    return out


def gated_rows(shape: Shape) -> int:
    """Of how many rows `feed_forward` has gate and up in memory at once."""
    return max(_LEAST_GATED, _GATED // (2 * shape.d_ff))


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
        inner = gated(base, _linear_in(hidden[row], layer.gate_up[expert]))
        out[row] += _linear_in(inner, down[expert]) * shares[row, place, None]
    return out

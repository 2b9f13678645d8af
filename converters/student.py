"""A student in training: the base with low-rank changes that have gradients.

Knows the forward pass with changes of any matrix of a layer. Does not know what it is
trained towards. The weights are the GGUF's own, dequantized; only the changes are trained.
PEFT's layers would do the same behind a model of transformers; the walk here reads a prefix
once for all conversations and does not pad, which is most of a step's time on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from superego.converters.gradients import Attention, Norm, Product, Rotate, SwiGLU
from superego.converters.slot import Slot
from superego.converters.streams import WRITES, Change, Changes, Pack, changed_layer
from superego.converters.transformer import (
    Base,
    KeyValue,
    Layer,
    Write,
    attend,
    halves_to_pairs,
    pairs_to_halves,
)
from superego.errors import SuperegoError

_ROTATED = ("attn_q", "attn_k")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r), rows in half layout


class Student:
    """The base with pairs in training and pairs that stay as they are."""

    def __init__(self, base: Base, start: Changes, slot: Slot | None) -> None:
        """`start` are changes as a fit left them; `slot` is theirs, whose mark stays as it is.

        Raises SuperegoError for a base with experts, or fused matrices, which cannot be trained.
        """
        if not base.separate:
            raise SuperegoError(
                f"{base.path}: training needs separate matrices for queries, keys, values, gate "
                "and up, and no experts; compile works on this base, distil and refine do not"
            )
        self.base, self.slot = base, slot
        mark = dict(slot.changes) if slot else {}
        folded = {place: change for place, change in mark.items() if place[1] not in WRITES}
        self._layers = [
            changed_layer(base, i, folded, base.dtype) for i in range(base.shape.n_layer)
        ]
        self.fixed: dict[tuple[int, str], Pair] = {}
        self.pairs: dict[tuple[int, str], Pair] = {}
        for (index, matrix), change in start.items():
            marked = mark.get((index, matrix))
            if marked is not None and matrix not in WRITES:
                continue  # folded in
            a, b = change.a.float(), change.b.float()
            if matrix in _ROTATED and base.shape.rope_pairs:
                b = pairs_to_halves(b, base.shape.head_dim)
            if marked is not None:
                n = len(marked.a)
                self.fixed[index, matrix] = a[:n], b[:, :n]
                a, b = a[n:], b[:, n:]
            elif slot and matrix in ("attn_k", "attn_v"):
                self.fixed[index, matrix] = a, b  # cells: a rank each, read by the marks
                continue
            if len(a):
                self.pairs[index, matrix] = _balanced(a, b)
        self._require()

    def add(self, rank: int, matrices: tuple[str, ...], seed: int) -> None:
        """Pairs of `rank` for matrices that have none in training: A random, B zero."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for index in range(self.base.shape.n_layer):
            for matrix in matrices:
                wide, out = self._size(matrix)
                drawn = torch.randn(rank, wide, generator=generator, device="cpu")
                a = drawn.to(self.base.device) / wide**0.5
                if (index, matrix) not in self.pairs:
                    self.pairs[index, matrix] = a, torch.zeros(out, rank)
        self._require()

    def _require(self) -> None:
        for a, b in self.pairs.values():
            a.requires_grad_()
            b.requires_grad_()

    def _size(self, matrix: str) -> tuple[int, int]:
        """Columns and rows of a matrix."""
        shape = self.base.shape
        d, heads, kv = shape.d_model, shape.n_head * shape.head_dim, 0
        kv = shape.n_head_kv * shape.head_dim
        return {
            "attn_q": (d, heads),
            "attn_k": (d, kv),
            "attn_v": (d, kv),
            "attn_output": (heads, d),
            "ffn_gate": (d, shape.d_ff),
            "ffn_up": (d, shape.d_ff),
            "ffn_down": (shape.d_ff, d),
        }[matrix]

    def parameters(self) -> list[torch.Tensor]:
        """All tensors in training, in a fixed order."""
        return [each for place in sorted(self.pairs) for each in self.pairs[place]]

    def forward(self, pack: Pack) -> torch.Tensor:
        """The last stream (n, d_model) at the rows that predict replies."""
        base, shape = self.base, self.base.shape
        n = len(pack.prefix)
        stream = torch.cat([base.embed(pack.prefix), base.embed(pack.tokens)])
        positions = torch.cat([pack.prefix_rows.positions, pack.rows.positions])
        rotations = base.rotations(positions)
        widths = [shape.n_head * shape.head_dim] + [shape.n_head_kv * shape.head_dim] * 2
        turned = shape.n_head + shape.n_head_kv
        for index, layer in enumerate(self._layers):
            hidden = Norm.apply(stream, layer.attn_norm, shape.rms_eps, base.dtype)
            qkv = Product.apply(hidden, layer.qkv, layer.qkv_bias)
            qkv = self._add(qkv, hidden, index, ("attn_q", "attn_k", "attn_v"), widths)
            heads = qkv.view(len(stream), -1, shape.head_dim)
            both, value = heads[:, :turned], heads[:, turned:]
            if layer.q_norm is not None and layer.k_norm is not None:
                normed = [
                    Norm.apply(part.float(), weight, shape.rms_eps, base.dtype)
                    for part, weight in (
                        (both[:, : shape.n_head], layer.q_norm),
                        (both[:, shape.n_head :], layer.k_norm),
                    )
                ]
                both = torch.cat(normed, 1)
            both = Rotate.apply(both, rotations[index], shape)
            query, key = both[:, : shape.n_head], both[:, shape.n_head :]
            attended = self._attend(layer, query, key, value, pack, n)
            stream = stream + self._write(layer.attn_output, attended, index, "attn_output")
            hidden = Norm.apply(stream, layer.ffn_norm, shape.rms_eps, base.dtype)
            gate_up = Product.apply(hidden, layer.gate_up, layer.gate_up_bias)
            gate_up = self._add(gate_up, hidden, index, ("ffn_gate", "ffn_up"), [shape.d_ff] * 2)
            if shape.gelu:
                gate, up = gate_up.chunk(2, -1)
                inner = F.gelu(gate, approximate="tanh") * up
            else:
                inner = SwiGLU.apply(gate_up)
            stream = stream + self._write(layer.ffn_down, inner, index, "ffn_down")
        return stream[n:][pack.predicts]

    def _attend(
        self,
        layer: Layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pack: Pack,
        n: int,
    ) -> torch.Tensor:
        """Attention of the prefix, the first n rows, and of the conversations behind it."""
        shape = self.base.shape
        if shape.attention_cap:  # autograd through the plain arithmetic
            front = attend(self.base, layer, query[:n], key[:n], value[:n], pack.prefix_rows, None)
            shared = KeyValue(key[:n].transpose(0, 1), value[:n].transpose(0, 1))
            rest = attend(self.base, layer, query[n:], key[n:], value[n:], pack.rows, shared)
            return torch.cat([front, rest])
        scale, window = shape.attention_scale, shape.windows[layer.index]
        front = Attention.apply(
            query[:n], key[:n], value[:n], None, None, pack.prefix_rows, scale, window
        )
        rest = Attention.apply(
            query[n:], key[n:], value[n:], key[:n], value[:n], pack.rows, scale, window
        )
        return torch.cat([front, rest])

    def _low(self, index: int, matrix: str, inputs: torch.Tensor) -> torch.Tensor | None:
        """What the changes of a matrix add to its product; None where it has none."""
        added = None
        for pairs in (self.pairs, self.fixed):
            if (index, matrix) in pairs:
                a, b = (each.to(inputs.dtype) for each in pairs[index, matrix])
                product = F.linear(F.linear(inputs, a), b)
                added = product if added is None else added + product
        return added

    def _add(
        self,
        product: torch.Tensor,
        inputs: torch.Tensor,
        index: int,
        matrices: tuple[str, ...],
        widths: list[int],
    ) -> torch.Tensor:
        """The joint product of several matrices with their changes."""
        added = [self._low(index, matrix, inputs) for matrix in matrices]
        if all(each is None for each in added):
            return product
        parts = product.split(widths, 1)
        return torch.cat([p if e is None else p + e for p, e in zip(parts, added, strict=True)], 1)

    def _write(self, write: Write, inputs: torch.Tensor, index: int, matrix: str) -> torch.Tensor:
        """What a matrix and its change write to the stream, float32."""
        assert write.weight is not None  # no experts
        product = Product.apply(inputs, write.weight, write.bias)
        added = self._low(index, matrix, inputs)
        if added is not None:
            product = product + added
        product = product.float()
        if write.norm is not None:
            product = Norm.apply(product, write.norm, write.eps, torch.float32)
        return product if write.scale == 1 else product * write.scale

    @torch.no_grad()
    def keep_slot(self) -> None:
        """Take out of the pairs what would be read as the slot's mark, or change it."""
        if self.slot is None:
            return
        basis = self.slot.basis()
        for (index, matrix), (a, b) in self.pairs.items():
            if matrix in WRITES:
                b -= basis @ (basis.T @ b)
            if (index, matrix) == (self.slot.layer, "ffn_down"):
                a[:, list(self.slot.neurons)] = 0

    @torch.no_grad()
    def state(self) -> dict[tuple[int, str], Pair]:
        """A copy of the pairs in training."""
        return {place: (a.clone(), b.clone()) for place, (a, b) in self.pairs.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[tuple[int, str], Pair]) -> None:
        """Put such a copy in their place."""
        for place, (a, b) in state.items():
            self.pairs[place][0].copy_(a)
            self.pairs[place][1].copy_(b)

    @torch.no_grad()
    def changes(self) -> Changes:
        """All changes, rows as the GGUF has them."""
        found: dict[tuple[int, str], Change] = {}
        if self.slot:
            found |= {p: c for p, c in self.slot.changes.items() if p[1] not in WRITES}
        for pairs in (self.fixed, self.pairs):  # a slot's mark stands first
            for (index, matrix), (a, b) in pairs.items():
                if matrix in _ROTATED and self.base.shape.rope_pairs:
                    b = halves_to_pairs(b, self.base.shape.head_dim)
                before = found.get((index, matrix))
                if before is not None:
                    a, b = torch.cat([before.a, a]), torch.cat([before.b, b], 1)
                found[index, matrix] = Change(a.detach().clone(), b.detach().clone())
        return found


def _balanced(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """The same product B A of two factors with equal norms a rank, as steps want them."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = s.sqrt()
    return (root[:, None] * (v @ q_a.T)).contiguous(), (q_b @ u * root).contiguous()

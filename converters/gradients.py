"""Operations of the walk with gradients written by hand, for training on a CPU.

Knows arithmetic and its derivatives. Does not know what is trained. Autograd's own chains of
small operations cost two to three times as much here: they are bound by memory, and its
attention backward is made for long sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from superego.converters.products import linear
from superego.converters.shape import Shape
from superego.converters.transformer import Base, Rotation, Rows, capped, rotate

_HEAD_ROWS = 256  # rows multiplied with the vocabulary at once
_CACHED_ROWS = 16  # of these, whose logits stay in the processor's cache


class Product(torch.autograd.Function):
    """Rows (n, in) with a matrix (out, in) that is not in training -> (n, out)."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        return linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ ctx.weight, None, None


class Norm(torch.autograd.Function):
    """Root-mean-square norm of the last axis of float32 rows, returned in another type."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(rows, scale)
        ctx.weight = weight
        return (rows * scale * weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, scale = ctx.saved_tensors
        weighed = grad.float() * ctx.weight
        along = (weighed * rows).mean(-1, keepdim=True)
        return weighed.mul_(scale).addcmul_(rows, along.mul_(scale**3), value=-1), None, None, None


class SwiGLU(torch.autograd.Function):
    """(n, 2 d_ff) products of gate and up -> silu(gate) ⊙ up, (n, d_ff)."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        by_gate, by_up = out.chunk(2, -1)
        open_ = torch.sigmoid(gate)
        silu = gate * open_
        torch.mul(grad, silu, out=by_up)
        slope = torch.addcmul(open_ + silu, silu, open_, value=-1)
        torch.mul(slope.mul_(up), grad, out=by_gate)
        return out


class Rotate(torch.autograd.Function):
    """Rotary positions on (n, heads, head_dim); its derivative turns back."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, rotation: Rotation, shape: Shape) -> torch.Tensor:
        ctx.rotation, ctx.shape = rotation, shape
        return rotate(heads, *rotation, shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.rotation
        return rotate(grad, cos, -sin, ctx.shape), None, None


class Attention(torch.autograd.Function):
    """Causal attention of packed rows over a shared prefix and themselves, uncapped.

    query (n, n_head, head_dim), key and value (n, n_head_kv, head_dim), those of the prefix
    (p, n_head_kv, head_dim) or None -> (n, n_head · head_dim). Scores are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        rows: Rows,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        n, n_head, dim = query.shape
        n_kv = key.shape[1]
        group = n_head // n_kv
        out = query.new_empty(n, n_head * dim)
        ctx.kept = []
        for start, stop, gather, scatter in rows.chunks:
            batch, width = gather.shape
            q = query[start:stop][gather].view(batch, width, n_kv, group, dim)
            q = q.permute(0, 2, 3, 1, 4).reshape(batch * n_kv, group * width, dim)
            q = q.float().mul_(scale)
            k, v = key[start:stop][gather], value[start:stop][gather]
            if prefix_key is not None and prefix_value is not None:
                k = torch.cat([prefix_key.expand(batch, -1, -1, -1), k], 1)
                v = torch.cat([prefix_value.expand(batch, -1, -1, -1), v], 1)
            length = k.shape[1]
            k = k.transpose(1, 2).reshape(batch * n_kv, length, dim).float()
            v = v.transpose(1, 2).reshape(batch * n_kv, length, dim).float()
            ahead = length - width
            hidden = torch.ones(width, length, dtype=torch.bool).triu(ahead + 1)
            if window:  # a token sees itself and the window - 1 before it
                hidden |= torch.ones(width, length, dtype=torch.bool).tril(ahead - window)
            scores = torch.bmm(q, k.transpose(1, 2))
            p = scores.masked_fill_(hidden.repeat(group, 1), float("-inf")).softmax(-1)
            a = torch.bmm(p, v).view(batch, n_kv, group, width, dim)
            a = a.permute(0, 3, 1, 2, 4).reshape(batch * width, n_head * dim)
            out[start:stop] = a[scatter].to(query.dtype)
            ctx.kept.append((q, k, v, p))
        ctx.rows, ctx.scale = rows, scale
        ctx.sizes = n, n_head, n_kv, dim, 0 if prefix_key is None else len(prefix_key)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        n, n_head, n_kv, dim, ahead = ctx.sizes
        group = n_head // n_kv
        by_query = grad.new_empty(n, n_head, dim)
        by_key, by_value = grad.new_empty(n, n_kv, dim), grad.new_empty(n, n_kv, dim)
        # autograd's own threads know nothing of the default device
        front_key, front_value = (
            grad.new_zeros(ahead, n_kv, dim, dtype=torch.float32) for _ in range(2)
        )
        for (start, stop, gather, scatter), (q, k, v, p) in zip(
            ctx.rows.chunks, ctx.kept, strict=True
        ):
            batch, width = gather.shape
            length = k.shape[1]
            g = grad.new_zeros(batch * width, n_head * dim)
            g[scatter] = grad[start:stop]
            g = g.view(batch, width, n_kv, group, dim).permute(0, 2, 3, 1, 4)
            g = g.reshape(batch * n_kv, group * width, dim).float()
            of_value = torch.bmm(p.transpose(1, 2), g)
            s = torch.bmm(g, v.transpose(1, 2)).mul_(p)
            s.addcmul_(p, s.sum(-1, keepdim=True), value=-1)
            of_query = torch.bmm(s, k).mul_(ctx.scale).view(batch, n_kv, group, width, dim)
            of_query = of_query.permute(0, 3, 1, 2, 4).reshape(batch * width, n_head, dim)
            of_key = torch.bmm(s.transpose(1, 2), q)
            by_query[start:stop] = of_query[scatter].to(grad.dtype)
            for of, front, by in (
                (of_key, front_key, by_key),
                (of_value, front_value, by_value),
            ):
                each = of.view(batch, n_kv, length, dim).transpose(1, 2)
                front += each[:, :ahead].sum(0)
                own = each[:, ahead:].reshape(batch * width, n_kv, dim)
                by[start:stop] = own[scatter].to(grad.dtype)
        ctx.kept = []
        fronts = [f.to(grad.dtype) if ahead else None for f in (front_key, front_value)]
        return by_query, by_key, by_value, *fronts, None, None, None


class Divergence(torch.autograd.Function):
    """Σ weight · KL(teacher‖student) over rows, full vocabulary, nats.

    teacher, student: last residual streams (n, d_model). The teacher's distribution is made
    again from its stream: 4 d_model bytes a token are kept instead of its 49,152 logits or a
    part of them. Where the teacher is a text, tokens (n,), the divergence is from these.
    The derivative is made in the forward pass, piece by piece.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, base: Base
    ) -> torch.Tensor:
        total = 0.0
        grad = torch.empty_like(student)
        cap = base.shape.logit_cap
        for start in range(0, len(student), _HEAD_ROWS):
            part = slice(start, start + _HEAD_ROWS)
            rows = student[part]
            scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + base.shape.rms_eps)
            logits = linear((rows * scale * base.output_norm).to(base.dtype), base.output)
            if base.output_bias is not None:
                logits = logits + base.output_bias
            texts = teacher.dim() == 1
            wanted = teacher[part] if texts else base.logits(teacher[part])
            few = _CACHED_ROWS if rows.device.type == "cpu" else _HEAD_ROWS
            for i in range(0, len(rows), few):
                some = slice(i, i + few)
                w = weight[part][some]
                raw = logits[some].float() * base.shape.logit_scale
                own = capped(raw, cap)
                own = own - own.amax(-1, keepdim=True)
                q = own.exp()
                q_sum = q.sum(-1, keepdim=True)
                if texts:
                    p = F.one_hot(wanted[some], own.shape[1]).float()
                    each = q_sum.log()[:, 0] - own.gather(1, wanted[some, None])[:, 0]
                else:
                    other = wanted[some].float()
                    other = other - other.amax(-1, keepdim=True)
                    p = other.exp()
                    p_sum = p.sum(-1, keepdim=True)
                    p /= p_sum
                    each = (p * other.sub_(own)).sum(-1) + (q_sum / p_sum).log()[:, 0]
                total += float((each * w).sum())
                slope = q.mul_(w[:, None] / q_sum).sub_(p.mul_(w[:, None]))
                if cap:
                    slope.mul_(1 - (raw / cap).tanh().square())
                logits[some] = slope.mul_(base.shape.logit_scale)
            back = (logits @ base.output).float() * base.output_norm
            along = (back * rows).mean(-1, keepdim=True)
            grad[part] = back * scale - rows * along * scale**3
        ctx.save_for_backward(grad)
        return student.new_tensor(total)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return own * grad, None, None, None

"""Hand-written derivatives are those of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from superego.base import open_base
from superego.converters.gradients import Attention, Divergence, Norm, Rotate, SwiGLU
from superego.converters.transformer import Base, KeyValue, Rows, attend, rms_norm, rotate

DRAW = torch.Generator().manual_seed(1)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW).requires_grad_()


def slopes(result: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return list(torch.autograd.grad((result.float() * weights).sum(), inputs))


@pytest.fixture(autouse=True)
def _with_gradients() -> Any:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    path = tiny_model(tmp_path_factory.mktemp("tiny") / "base.gguf")
    with torch.no_grad():
        return Base(open_base(str(path)).header, torch.float32, resident=True)


def test_norm() -> None:
    rows, weight = draw(7, 16), torch.linspace(0.5, 2, 16)
    own, theirs = (
        Norm.apply(rows, weight, 1e-5, torch.float32),
        rms_norm(rows, weight, 1e-5, torch.float32),
    )
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(slopes(own, rows), slopes(theirs, rows))


def test_swiglu() -> None:
    both = draw(5, 24)
    gate, up = both.chunk(2, -1)
    own, theirs = SwiGLU.apply(both), F.silu(gate) * up
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(slopes(own, both), slopes(theirs, both))


def test_rotation(base: Base) -> None:
    heads = draw(6, base.shape.n_head, base.shape.head_dim)
    rotation = base.rotation(torch.arange(6), 0)
    own, theirs = Rotate.apply(heads, rotation, base.shape), rotate(heads, *rotation, base.shape)
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(slopes(own, heads), slopes(theirs, heads))


@pytest.mark.parametrize("window", [0, 3])
def test_attention_behind_a_prefix(base: Base, window: int) -> None:
    """Conversations of several lengths, in several chunks, with queries that share keys."""
    shape, lengths, ahead = base.shape, [2, 3, 3, 7], 4
    rows = Rows(lengths, ahead, chunk_rows=8)
    q = draw(sum(lengths), shape.n_head, shape.head_dim)
    k, v = (draw(sum(lengths), shape.n_head_kv, shape.head_dim) for _ in range(2))
    pk, pv = (draw(ahead, shape.n_head_kv, shape.head_dim) for _ in range(2))
    own = Attention.apply(q, k, v, pk, pv, rows, shape.attention_scale, window)
    shared = KeyValue(pk.transpose(0, 1), pv.transpose(0, 1))
    kept = shape.windows
    object.__setattr__(shape, "windows", [window] * shape.n_layer)
    try:
        theirs = attend(base, base.layer(0), q, k, v, rows, shared)
    finally:
        object.__setattr__(shape, "windows", kept)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    every = (q, k, v, pk, pv)
    torch.testing.assert_close(slopes(own, *every), slopes(theirs, *every), rtol=1e-4, atol=1e-5)


def test_divergence_from_a_teacher_and_from_a_text(base: Base) -> None:
    student, teacher = draw(20, base.shape.d_model), draw(20, base.shape.d_model).detach()
    weight = torch.rand(20, generator=DRAW)
    log_q = base.logits(student).log_softmax(-1)
    log_p = base.logits(teacher).log_softmax(-1)
    theirs = ((log_p.exp() * (log_p - log_q)).sum(-1) * weight).sum()
    own = Divergence.apply(student, teacher, weight, base)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(own, student),
        torch.autograd.grad(theirs, student),
        rtol=1e-3,
        atol=1e-6,
    )
    said = torch.arange(20) % base.shape.n_vocab
    theirs = (F.cross_entropy(base.logits(student), said, reduction="none") * weight).sum()
    own = Divergence.apply(student, said, weight, base)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(own, student),
        torch.autograd.grad(theirs, student),
        rtol=1e-3,
        atol=1e-6,
    )

"""Products: every library gives the same ones, and light matrices are rounded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from superego.base import open_base
from superego.converters import products
from superego.converters.products import FEW, Light, has_light, linear, to_light_
from superego.converters.transformer import Base

CPU = torch.device("cpu")
only_with_light = pytest.mark.skipif(
    not has_light(torch.float32, CPU), reason="torch has no FBGEMM here"
)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_torchs_own(n: int, dtype: torch.dtype) -> None:
    rows, weight, bias = drawn(n, 96).to(dtype), drawn(160, 96).to(dtype), drawn(160).to(dtype)
    expected = F.linear(rows.double(), weight.double(), bias.double())
    near = {"rtol": 0.02, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-4}
    with torch.no_grad():
        for which in (bias, None):
            want = expected if which is not None else expected - bias.double()
            torch.testing.assert_close(linear(rows, weight, which).double(), want, **near)


def test_a_product_has_gradients_where_they_are_asked_for() -> None:
    rows, weight = drawn(5, 8), drawn(3, 8).requires_grad_()
    with torch.enable_grad():
        linear(rows, weight).sum().backward()
    torch.testing.assert_close(weight.grad, rows.sum(0).expand(3, 8))


@only_with_light
@pytest.mark.parametrize("n", [1, 11, FEW])
def test_a_light_matrix_is_the_rounded_one(n: int) -> None:
    rows, weight, bias = drawn(n, 96), drawn(160, 96), drawn(160)
    light = Light(weight)
    to_light_(weight)
    assert torch.equal(weight, weight.half().float())
    for which in (bias, None):
        expected = F.linear(rows, weight, which)
        torch.testing.assert_close(light.linear(rows, which), expected, rtol=0, atol=1e-4)


@only_with_light
def test_few_rows_have_light_matrices_and_many_have_not(tmp_path: Path) -> None:
    model = open_base(str(tiny_model(tmp_path / "t.gguf", seed=1)))
    base = Base(model.header, torch.float32, resident=True)
    assert base.layer_for(0, FEW + 1).light_qkv is None
    light = base.layer_for(0, FEW)
    assert light.light_qkv is not None
    assert light.attn_output.light is not None
    assert base.layer_for(0, 1) is light
    base.let_go_of_light()
    assert base.layer(0).light_qkv is None
    # of a base that is read layer by layer the matrices are rounded, as the light ones are
    passing = Base(model.header, torch.float32, resident=False)
    hidden = drawn(4, base.shape.d_model)
    for index in range(base.shape.n_layer):
        rounded, packed = passing.layer_for(index, 4), base.layer_for(index, 4)
        assert rounded.light_qkv is None
        for product in ("project", "gate_and_up"):
            found, expected = (getattr(each, product)(hidden) for each in (rounded, packed))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    whole = passing.layer(0).qkv
    assert not torch.equal(whole, whole.half().float())  # what is read anew is as it is in the file


def test_without_the_libraries_torchs_own_products_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, weight = drawn(5, 8), drawn(3, 8)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    monkeypatch.setattr(products, "_has_fbgemm", lambda: False)
    assert torch.equal(linear(rows, weight), F.linear(rows, weight))
    assert not has_light(torch.float32, CPU)
    assert not has_light(torch.bfloat16, CPU)

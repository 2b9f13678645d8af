"""Copies of adapters: the same product, other ranks; nothing else is changed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from superego import roster
from superego.adapter import read_adapter
from superego.adapter_copy import batch_invariant, is_batch_invariant, write_batch_invariant


def adapter_file(path: Path, alpha: float, ranks: list[int], kind: GGMLQuantizationType) -> Path:
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string("superego.manifesto", "Be kind.")
    writer.add_array("general.tags", ["one", "two"])
    for i, rank in enumerate(ranks):
        for suffix, shape in (("a", (rank, 32)), ("b", (16, rank))):
            matrix = rng.standard_normal(shape).astype(np.float32)
            name = f"blk.{i}.ffn_down.weight.lora_{suffix}"
            writer.add_tensor(name, gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def products(path: Path) -> list[np.ndarray]:
    """What llama.cpp adds to each matrix: B A times alpha / rank, or B A where alpha is 0."""
    adapter = read_adapter(path)
    data = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    return [
        (adapter.alpha / a.shape[0] if adapter.alpha else 1.0)
        * (data[f"{name}.lora_b"] @ data[f"{name}.lora_a"])
        for name, (a, _) in adapter.pairs.items()
    ]


@pytest.mark.parametrize("alpha", [0.0, 8.0])
@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.BF16]
)
def test_a_batch_invariant_copy_does_the_same(
    tmp_path: Path, kind: GGMLQuantizationType, alpha: float
) -> None:
    path = adapter_file(tmp_path / "a.gguf", alpha, [8, 1, 4], kind)
    assert not is_batch_invariant(read_adapter(path))
    write_batch_invariant(read_adapter(path), copy := tmp_path / "b.gguf")
    made = read_adapter(copy)
    assert [a.shape[0] for a, _ in made.pairs.values()] == [9, 1, 5]
    assert made.header.metadata == {**read_adapter(path).header.metadata, "adapter.lora.alpha": 0.0}
    for before, after in zip(products(path), products(copy), strict=True):
        np.testing.assert_allclose(after, before, rtol=2e-3, atol=2e-3)
    assert batch_invariant([path, copy], tmp_path) == [tmp_path / "0.gguf", copy]


def test_a_factor_that_would_overflow_float16_makes_float32(tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.gguf", 4e5, [4], GGMLQuantizationType.F16)
    write_batch_invariant(read_adapter(path), copy := tmp_path / "b.gguf")
    np.testing.assert_allclose(products(copy)[0], products(path)[0], rtol=1e-3, atol=1)


def test_a_served_rosters_adapters_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter_file(tmp_path / "a.gguf", 8.0, [4], GGMLQuantizationType.F16)
    adapter = read_adapter(path)
    served = roster.Roster({"a": roster.Persona("a", adapter, 1.0)}, [path], True, {})
    monkeypatch.delattr(roster, "read_adapter")
    assert roster.with_slots(served, tmp_path) == served

"""Adapter files: a round trip, and every misfit found before llama.cpp sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from gguf import GGUFReader, GGUFWriter

from superego.adapter import check_fit, mismatches, read_adapter, write_adapter
from superego.errors import SuperegoError
from superego.gguf_file import read_header

Pair = tuple[np.ndarray, np.ndarray]


def pair(r: int = 4, rows: int = 64, columns: int = 64, seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((r, columns)), rng.standard_normal((rows, r))


def raw(path: Path, names: list[str], alpha: str = "f32", kind: str = "adapter") -> Path:
    """An adapter written without our writer's checks."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha == "f32":
        writer.add_float32("adapter.lora.alpha", 4.0)
    else:
        writer.add_uint32("adapter.lora.alpha", 4)
    for name in names:
        writer.add_tensor(name, np.zeros((4, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    a, b = pair()
    path = tmp_path / "a.gguf"
    write_adapter(path, "llama", {"blk.0.attn_output.weight": (a, b)}, {"superego.method": "x"})
    adapter = read_adapter(path)
    assert (adapter.rank, adapter.alpha, adapter.own) == (4, 4.0, {"method": "x"})
    found = {t.name: t.data for t in GGUFReader(path).tensors}
    assert np.array_equal(found["blk.0.attn_output.weight.lora_a"], a.astype(np.float16))
    assert np.array_equal(found["blk.0.attn_output.weight.lora_b"], b.astype(np.float16))


def test_every_mismatch_is_listed_with_expected_and_found(tmp_path: Path) -> None:
    base = read_header(tiny_model(tmp_path / "base.gguf"))
    path = tmp_path / "a.gguf"
    write_adapter(
        path,
        "stablelm",  # writing one for an architecture in the table would be refused
        {
            "blk.0.attn_output.weight": pair(rows=32),
            "blk.7.ffn_down.weight": pair(),
            "token_embd.weight": pair(rows=259),
        },
        {},
    )
    found = "\n".join(mismatches(read_adapter(path), base))
    assert "the adapter is for 'stablelm', the base is 'llama'" in found
    assert "(32, 64), the base has (64, 64)" in found
    assert "blk.7.ffn_down.weight: the base has no such tensor" in found
    assert "tied embedding" in found
    with pytest.raises(SuperegoError, match="made for another base"):
        check_fit(read_adapter(path), base)


@pytest.mark.parametrize(
    ("names", "alpha", "kind", "said"),
    [
        ([], "f32", "adapter", "no LoRA tensors"),
        (["blk.0.attn_output.weight.lora_a"], "f32", "adapter", "only one of"),
        (["blk.0.attn_output.weight"], "f32", "adapter", "neither"),
        (["x.lora_a", "x.lora_b"], "u32", "adapter", "expected a float32"),
        (["x.lora_a", "x.lora_b"], "f32", "model", "expected 'adapter'"),
    ],
)
def test_malformed_adapters_are_refused(
    tmp_path: Path, names: list[str], alpha: str, kind: str, said: str
) -> None:
    with pytest.raises(SuperegoError, match=said):
        read_adapter(raw(tmp_path / "a.gguf", names, alpha, kind))


def test_an_overflow_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("old")
    a, b = pair()
    with pytest.raises(SuperegoError, match="overflows float16"):
        write_adapter(path, "llama", {"blk.0.attn_output.weight": (a * 1e9, b)}, {})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]

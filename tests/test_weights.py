"""Weights read in pieces are those that gguf reads whole; a file cut short is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from gguf import GGMLQuantizationType, dequantize

from superego.converters import weights
from superego.converters.transformer import Base
from superego.converters.weights import Weights
from superego.errors import SuperegoError
from superego.gguf_file import read_header

Type = GGMLQuantizationType
NAME = "blk.1.ffn_down.weight"


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.F16, Type.F32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_what_gguf_reads_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type, dtype: torch.dtype
) -> None:
    header = read_header(tiny_model(tmp_path / "t.gguf", kind=kind))
    info = header.tensors[NAME]
    raw = header.path.read_bytes()[info.offset : info.offset + info.n_bytes]
    rows = np.frombuffer(raw, np.uint8).reshape(info.shape[0], -1)
    whole = torch.from_numpy(np.array(dequantize(rows, kind), np.float32)).to(dtype)
    monkeypatch.setattr(weights, "_PIECE", 1 << 10)  # several pieces
    read = Weights(header, dtype)
    assert torch.equal(read.matrix(NAME), whole)
    assert torch.equal(read.matrix(NAME, rows=slice(5, 9)), whole[5:9])
    assert torch.equal(read.gathered(NAME, [7, 3, 7]), whole[[7, 3, 7]])


def test_a_file_that_was_cut_short_and_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "t.gguf")
    read = Weights(read_header(path), torch.float32)
    with pytest.raises(SuperegoError, match="expected \\(3, 64\\) as the metadata says"):
        read.matrix(NAME, torch.empty(3, 64))
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(SuperegoError, match="it was changed while it was read"):
        read.matrix(NAME)


def test_what_is_kept_changes_no_bit_and_is_let_go(tmp_path: Path) -> None:
    header = read_header(tiny_model(tmp_path / "t.gguf"))
    kept, not_kept = (Base(header, torch.bfloat16, resident=r) for r in (True, False))
    tokens = torch.tensor([5, 9, 5])
    assert torch.equal(kept.embed(tokens), not_kept.embed(tokens))
    with torch.no_grad():
        stream = kept.embed(tokens)
        assert torch.equal(kept.logits(stream), not_kept.logits(stream))
    for index in (0, 1):
        passing = not_kept.layer(index, passing=True)
        assert torch.equal(passing.gate_up, kept.layer(index).gate_up)
        assert torch.equal(passing.qkv, kept.layer(index).qkv)
    assert kept.layer(0) is kept.layer(0)
    kept.keep(1, tables=False)
    assert set(kept._layers) == {0}
    assert not kept.resident

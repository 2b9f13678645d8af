"""Blends: exact in llama.cpp, cut with a known error, never across bases."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conftest import refused, requantized, run, tiny_model
from gguf import GGMLQuantizationType
from test_attach import logits

import superego
from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel, open_base
from superego.blend import blend, cut
from superego.pairs import read_pairs
from superego.runtime import load


def random_adapter(path: Path, names: dict[str, tuple[int, int, int]], **metadata: str) -> Path:
    """Pairs of given (out, in, rank), strong enough to be seen in the logits."""
    rng = np.random.default_rng(sum(path.name.encode()))
    pairs = {
        name: (rng.standard_normal((rank, width)) * 0.05, rng.standard_normal((out, rank)) * 0.05)
        for name, (out, width, rank) in names.items()
    }
    write_adapter(path, "llama", pairs, {f"superego.{k}": v for k, v in metadata.items()})
    return path


def test_the_blend_is_both_adapters_at_their_scales(tmp_path: Path) -> None:
    """Different matrices, different ranks within a file; the rest is F16 rounding of B.

    The base is F32: llama.cpp rounds what a quantized matrix reads to eight bits, and there
    the order in which two adapters are attached already changes logits by more.
    """
    base = tiny_model(tmp_path / "base.gguf", kind=GGMLQuantizationType.F32)
    live = load(open_base(str(base)), n_ctx=256)
    down, out, q = "blk.0.ffn_down.weight", "blk.1.attn_output.weight", "blk.0.attn_q.weight"
    a = random_adapter(tmp_path / "a.gguf", {down: (64, 128, 4), out: (64, 64, 6)})
    b = random_adapter(tmp_path / "b.gguf", {down: (64, 128, 3), q: (64, 64, 5)})
    c = tmp_path / "c.gguf"
    blend([(read_adapter(a), 0.7), (read_adapter(b), -0.5)], c)
    bare = logits(live, b"ab")
    with superego.attach(live, a, 0.7), superego.attach(live, b, -0.5):
        both = logits(live, b"ab")
    with superego.attach(live, c):
        one = logits(live, b"ab")
    assert np.abs(both - bare).max() > 0.05
    assert np.abs(one - both).max() < 0.01 * np.abs(both - bare).max()


def test_on_the_real_model_too(pirate: Path, smollm2: BaseModel, tmp_path: Path) -> None:
    """As F16, for the same reason."""
    names = {f"blk.{i}.ffn_down.weight": (576, 1536, 4) for i in range(30)}
    other = random_adapter(tmp_path / "other.gguf", names)
    out = tmp_path / "blend.gguf"
    result = run("blend", f"{pirate}:0.7", f"{other}:0.5", "-o", str(out), "--json")
    report = json.loads(result.stdout)
    assert report["matrices"] == len(read_adapter(pirate).pairs)
    assert report["rank"] == read_adapter(pirate).rank + 4
    assert report["rank cut error"] == 0
    exact = requantized(smollm2, tmp_path / "f16.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_F16)
    live = load(open_base(str(exact)), n_ctx=256)
    bare = logits(live)
    with superego.attach(live, pirate, 0.7), superego.attach(live, other, 0.5):
        both = logits(live)
    with superego.attach(live, out):
        one = logits(live)
    assert np.abs(one - both).max() < 0.02 * np.abs(both - bare).max()
    assert "of: pirate × 0.7 and other × 0.5" in run("log", str(out)).stdout
    assert "is a blend of pirate × 0.7 and other × 0.5" in refused(
        "evaluate", str(out), "--base", "smollm2"
    )


def test_one_file_given_twice_is_there_once(tmp_path: Path) -> None:
    a = random_adapter(tmp_path / "a.gguf", {"blk.0.ffn_down.weight": (64, 128, 4)})
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    blend([(read_adapter(a), 0.75)], once)
    blend([(read_adapter(a), 0.0), (read_adapter(a), 0.5), (read_adapter(a), 0.25)], twice)
    first, second = (read_pairs(read_adapter(path)) for path in (once, twice))
    for name, (down, up) in first.items():
        assert np.array_equal(second[name][0], down)
        assert np.array_equal(second[name][1], up)
    message = refused("blend", f"{a}:0.5", f"{a}:-0.5", "-o", str(tmp_path / "none.gguf"))
    assert "add up to 0" in message
    assert not (tmp_path / "none.gguf").exists()


def test_a_rank_cut_is_the_best_one_and_its_error_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((8, 40)), rng.standard_normal((30, 8))
    new_a, new_b, lost, whole = cut(a, b, 5)
    spectrum = np.linalg.svd(b @ a, compute_uv=False)
    assert new_a.shape == (5, 40)
    assert new_b.shape == (30, 5)
    assert np.linalg.norm(b @ a - new_b @ new_a) == pytest.approx(
        np.sqrt((spectrum[5:] ** 2).sum()), rel=1e-4
    )
    assert lost / whole == pytest.approx((spectrum[5:] ** 2).sum() / (spectrum**2).sum())
    down = "blk.0.ffn_down.weight"
    path = random_adapter(tmp_path / "a.gguf", {down: (64, 128, 6)})
    out = tmp_path / "out.gguf"
    report = blend([(read_adapter(path), 1.0), (read_adapter(path), 1.0)], out, rank=6)
    assert report["rank"] == 6
    assert report["rank cut error"] < 1e-4  # twice the same change has its rank
    (once, twice) = (read_pairs(read_adapter(p))[down] for p in (path, out))
    assert np.allclose(twice[1] @ twice[0], 2 * once[1] @ once[0], atol=2e-3)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    down, out = "blk.0.ffn_down.weight", str(tmp_path / "out.gguf")
    a = random_adapter(tmp_path / "a.gguf", {down: (64, 128, 4)}, **{"base.fingerprint": "x"})
    wide = random_adapter(tmp_path / "w.gguf", {down: (64, 256, 4)})
    moved = random_adapter(tmp_path / "m.gguf", {down: (64, 128, 4)}, **{"base.fingerprint": "y"})
    assert "different bases cannot be blended" in refused("blend", str(a), str(wide), "-o", out)
    assert "superego move" in refused("blend", str(a), str(moved), "-o", out)
    assert "two adapters or more" in refused("blend", str(a), "-o", out)
    assert "no such file" in refused("blend", str(a), str(tmp_path / "none.gguf"), "-o", out)
    assert not Path(out).exists()

"""Attaching on a live model: it acts, it scales, it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model

import superego
from superego.adapter import read_adapter, write_adapter
from superego.base import open_base
from superego.errors import SuperegoError
from superego.runtime import load


def logits(llm: Any, text: bytes = b"The captain said that the sea") -> np.ndarray:
    llm.reset()  # other tests have spoken with it
    llm.eval(llm.tokenize(text))
    pointer = llm._ctx.get_logits()
    found = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()
    llm.reset()
    return found


def test_after_detach_the_logits_are_the_bases_bit_for_bit(llm: Any, pirate: Path) -> None:
    bare = logits(llm)
    with superego.attach(llm, pirate) as attachment:
        full = logits(llm)
        attachment.set_scale(0.5)
        half = logits(llm)
        attachment.set_scale(0.0)
        off = logits(llm)
    after = logits(llm)
    assert not np.array_equal(bare, full)
    assert not np.array_equal(full, half)
    assert np.array_equal(bare, off)
    assert np.array_equal(bare, after)


def test_plain_calls_do_the_same(llm: Any, pirate: Path) -> None:
    bare = logits(llm)
    superego.attach(llm, pirate, scale=0.8)
    a = logits(llm)
    superego.set_scale(llm, 1.0)
    b = logits(llm)
    superego.set_scale(llm, 0.8)
    assert np.array_equal(a, logits(llm))
    assert not np.array_equal(a, b)
    superego.detach(llm)
    assert superego.attachments(llm) == []
    assert np.array_equal(bare, logits(llm))


def test_opposite_scales_of_one_adapter_cancel(llm: Any, pirate: Path) -> None:
    bare = logits(llm)
    with superego.attach(llm, pirate, 0.7), superego.attach(llm, pirate, -0.7):
        both = logits(llm)
    assert np.array_equal(both, bare)


def test_a_stale_cache_is_never_reused(llm: Any, pirate: Path) -> None:
    """The prefix match of `generate` would replay keys made without the adapter."""
    prompt = llm.tokenize(b"Tell me about the weather today, please.")

    def reply() -> list[int]:
        return [t for t, _ in zip(llm.generate(prompt, temp=0.0), range(8), strict=False)]

    before = reply()
    with superego.attach(llm, pirate):
        warm = reply()
        llm.reset()
        llm._ctx.kv_cache_clear()
        assert warm == reply()
    assert before == reply()


def test_misfits_and_misuse_are_refused_before_llama_cpp(
    llm: Any, pirate: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    write_adapter(
        other, "llama", {"blk.0.attn_output.weight": (np.zeros((2, 8)), np.zeros((8, 2)))}, {}
    )
    with pytest.raises(SuperegoError, match="made for another base"):
        superego.attach(llm, other)
    with pytest.raises(SuperegoError, match="expected a number between"):
        superego.attach(llm, pirate, scale=float("nan"))
    with pytest.raises(SuperegoError, match="exactly one attached adapter, found 0"):
        superego.set_scale(llm, 1.0)
    attachment = superego.attach(llm, pirate)
    attachment.detach()
    attachment.detach()
    with pytest.raises(SuperegoError, match="not attached any more"):
        attachment.set_scale(1.0)
    assert superego.attachments(llm) == []


def test_damaged_adapters_are_refused_or_work(tmp_path: Path) -> None:
    """Seeded fuzz: whatever passes the checks in Python must not end the process."""
    model = open_base(str(tiny_model(tmp_path / "t.gguf")))
    live = load(model, n_ctx=256)
    rng = np.random.default_rng(1)
    good = tmp_path / "good.gguf"
    pairs = {
        f"blk.{i}.ffn_down.weight": (rng.random((4, 128)), rng.random((64, 4))) for i in range(2)
    }
    write_adapter(good, "llama", pairs, {"general.name": "good"})
    whole = good.read_bytes()
    front = read_adapter(good).header.table_bytes
    bad = tmp_path / "bad.gguf"
    refused = 0
    for case in range(500):
        data = bytearray(whole)
        if case % 4 == 0:
            data = data[: rng.integers(0, len(data))]
        elif case % 4 == 1:
            at = int(rng.integers(0, front - 4))
            data[at : at + 4] = rng.bytes(4)
        else:
            for at in rng.integers(0, front, rng.integers(1, 8)):
                data[at] ^= 1 << rng.integers(8)
        bad.write_bytes(data)
        try:
            with superego.attach(live, bad):
                live.reset()
                live.eval([5, 6, 7])
        except SuperegoError:
            refused += 1
    assert 300 < refused <= 500
    with superego.attach(live, good):
        assert len(superego.attachments(live)) == 1

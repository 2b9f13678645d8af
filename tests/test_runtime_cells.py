"""A slot's cells are put right where llama.cpp's rounding leaves them off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel
from superego.bundled import bundled
from superego.converters import runtime_cells
from superego.converters.adapter_changes import changes_of, pairs
from superego.converters.references import Prompts, prepare, seeds
from superego.converters.runtime_cells import Corrected, correct_cells
from superego.converters.slot import Slot, find_slot
from superego.converters.streams import Changes
from superego.converters.transformer import Base
from superego.errors import SuperegoError
from superego.pairs import read_pairs

Correct = Callable[..., Corrected | None]  # of `correct_cells`, slot and budget


@pytest.fixture(scope="module")
def base(smollm2: BaseModel) -> Base:
    torch.set_grad_enabled(False)
    return Base(smollm2.header, torch.float32, resident=True)


@pytest.fixture(scope="module")
def prompts(llm: Any, smollm2: BaseModel) -> Prompts:
    return prepare(llm, smollm2, bundled()["pirate"], seeds(0)[:4])


@pytest.fixture(scope="module")
def slot(base: Base, prompts: Prompts) -> Slot:
    found = find_slot(base, prompts.rest, prompts.prefixes)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def changes(pirate: Path) -> Changes:
    return changes_of(read_adapter(pirate))[0]


@pytest.fixture(scope="module")
def correct(base: Base, smollm2: BaseModel, changes: Changes, prompts: Prompts) -> Correct:
    return partial(correct_cells, base, smollm2, changes, student=prompts.prefixes.student)


@pytest.fixture(scope="module")
def corrected(correct: Correct, slot: Slot) -> Corrected:
    found = correct(slot=slot)
    assert found is not None
    return found


def test_values_are_some_percent_off_and_right_behind_it(corrected: Corrected) -> None:
    """What differs from look to look, one to two percent, is not followed."""
    assert 0.03 < corrected.before < 0.2
    assert corrected.after < 0.4 * corrected.before


def test_only_keys_and_values_change_and_by_ranks_behind_the_others(
    corrected: Corrected, changes: Changes
) -> None:
    for (index, matrix), change in changes.items():
        now, n = corrected.changes[index, matrix], len(change.a)
        assert torch.equal(now.a[:n], change.a)
        assert torch.equal(now.b[:, :n], change.b)
        assert len(now.a) == (2 * n if matrix in ("attn_k", "attn_v") else n)


def test_compile_writes_them_and_training_leaves_them_out(
    compiled: tuple[Path, dict[str, Any]], corrected: Corrected, changes: Changes, tmp_path: Path
) -> None:
    """In torch nothing is rounded to 8 bits: there a correction would be an error."""
    path, report = compiled
    before, after = report["cells off in llama.cpp"]
    assert 0.03 < before < 0.2
    assert after < 0.4 * before
    name = "blk.20.attn_v.weight"
    assert len(read_pairs(read_adapter(path))[name][0]) == 2 * len(changes[20, "attn_v"].a)
    again = tmp_path / "again.gguf"
    write_adapter(again, "llama", pairs(corrected.changes), {})
    found, _ = changes_of(read_adapter(again))
    assert {place: len(c.a) for place, c in found.items()} == {
        place: len(c.a) for place, c in changes.items()
    }
    torch.testing.assert_close(found[20, "attn_v"].b, changes[20, "attn_v"].b)


def test_what_is_hardly_off_is_left_alone(
    correct: Correct, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that rounds nothing, as GPUs have it, asks for no ranks."""
    monkeypatch.setattr(runtime_cells, "_LEAST", 0.2)
    assert correct(slot=slot) is None


def test_without_a_slot_or_room_the_fit_does_without(correct: Correct, slot: Slot) -> None:
    assert correct(slot=None) is None
    assert correct(slot=slot, budget=1 << 20) is None


def test_where_llama_cpp_cannot_be_asked_the_fit_does_without_and_says_why(
    correct: Correct, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise SuperegoError("adapter.gguf: cannot be written: No space left on device")

    monkeypatch.setattr(runtime_cells, "write_adapter", full)
    told: list[str] = []
    assert correct(slot=slot, tell=told.append) is None
    assert told == [
        "the slot's cells are not put right in llama.cpp: adapter.gguf: cannot be written: "
        "No space left on device"
    ]


def test_a_state_of_another_kind_is_nothing_to_tell_of(
    correct: Correct, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise SuperegoError("recurrent")

    monkeypatch.setattr(runtime_cells, "layout", refuse)
    told: list[str] = []
    assert correct(slot=slot, tell=told.append) is None
    assert not told

"""Scales of adapters with a slot: the fit is weakened, the slot stays whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import superego
from superego.adapter import Adapter, read_adapter
from superego.base import BaseModel
from superego.blend import blend
from superego.bundled import bundled
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import Drift, kl, log_softmax
from superego.gguf_file import read_tensor
from superego.logits import ParallelContext
from superego.pairs import (
    check_marks,
    has_slot,
    read_pairs,
    slot_marks,
    slot_ranks,
    slot_scales,
    write_copy,
    write_slot,
)
from superego.template import ChatTemplate

PROMPTS = ["What is a good breakfast?", "Why do cats purr?", "hi", "My bike is broken."]


def test_a_slot_is_there_as_a_whole_and_shared_by_several() -> None:
    assert slot_scales([1.0], [True]) == [0.0]
    assert slot_scales([0.25], [True]) == [0.75]
    assert slot_scales([0.0, 0.5], [True, True]) == [0.0, 0.5]
    assert slot_scales([1.0, 1.0], [True, True]) == [-0.5, -0.5]
    assert slot_scales([-0.5], [True]) == [0.5]  # the fit's opposite, without the slot
    assert slot_scales([0.3, 0.3], [False, True]) == pytest.approx([0.0, 0.7])


def counts(adapter: Adapter) -> tuple[int, int]:
    """Ranks of a slot in each matrix that marks, and in each that writes cells."""
    found: list[set[int]] = [set(), set()]
    for name, ranks in slot_ranks(adapter).items():
        found[name.endswith(("attn_k.weight", "attn_v.weight"))].add(int(ranks.sum()))
    (marks,), (cells,) = found
    return marks, cells


def test_a_slot_is_found_in_the_file_and_written_alone(pirate: Path, tmp_path: Path) -> None:
    adapter = read_adapter(pirate)
    ranks = slot_ranks(adapter)
    matrices = {name.rsplit(".", 2)[-2] for name in ranks}
    assert matrices == {"attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down"}
    assert counts(adapter) == (2, 4), "two tokens are marked; cells are written and corrected"
    assert write_slot(adapter, tmp_path / "slot.gguf")
    alone, whole = read_pairs(read_adapter(tmp_path / "slot.gguf")), read_pairs(adapter)
    for name, (a, b) in alone.items():
        kept = ranks[name]
        change = whole[name][1][:, kept] @ whole[name][0][kept]
        np.testing.assert_allclose(b @ a, change, rtol=2e-3, atol=5e-4 * np.abs(change).max())
    assert has_slot(read_adapter(tmp_path / "slot.gguf"))


def test_a_blend_has_the_slot_of_its_parts(pirate: Path, tmp_path: Path) -> None:
    """Each neuron is there once a part, and is one neuron still."""
    other, both = tmp_path / "other.gguf", tmp_path / "both.gguf"
    other.write_bytes(pirate.read_bytes())
    blend([(read_adapter(pirate), 0.5), (read_adapter(other), 0.5)], both)
    marks, own = slot_marks(read_adapter(both)), slot_marks(read_adapter(pirate))
    assert marks is not None
    assert own is not None
    assert (marks.matrix, marks.neurons) == (own.matrix, own.neurons)
    np.testing.assert_allclose(marks.directions, own.directions, atol=1e-3)
    assert counts(read_adapter(both)) == (4, 8)
    blend([(read_adapter(pirate), 1.0), (read_adapter(other), -0.5)], both)  # no share of it
    assert counts(read_adapter(both)) == (2, 4)
    assert len(slot_ranks(read_adapter(both))) == len(slot_ranks(read_adapter(pirate)))


@pytest.fixture(scope="module")
def teacher(llm: Any, smollm2: BaseModel) -> tuple[Any, list[np.ndarray]]:
    template = ChatTemplate(smollm2.header)
    encoded = encode(llm, template, bundled()["pirate"].body, PROMPTS)
    student = encode(llm, template, None, PROMPTS)
    with ParallelContext(llm, encoded.prefix, len(PROMPTS), 64) as context:
        rows = context.read(encoded.rest, [len(r) - 1 for r in encoded.rest])
    return student, [log_softmax(row) for row in rows]


def distance(llm: Any, teacher: Any, adapters: list[tuple[Adapter, float]]) -> float:
    student, wanted = teacher
    with ParallelContext(llm, student.prefix, len(PROMPTS), 64, adapters) as context:
        rows = context.read(student.rest, [len(r) - 1 for r in student.rest])
    return float(np.mean([kl(p, log_softmax(q)).mean() for p, q in zip(wanted, rows, strict=True)]))


def test_a_weaker_persona_is_between_the_base_and_the_whole(
    llm: Any, pirate: Path, teacher: Any
) -> None:
    """Scaled with everything else, a slot at 0.8 ruined nearly all that was recovered."""
    adapter = read_adapter(pirate)
    bare = distance(llm, teacher, [])
    for scale in (0.5, 0.8):
        assert distance(llm, teacher, [(adapter, scale)]) < 0.5 * bare, scale


def test_two_personas_at_once_share_the_slot(llm: Any, pirate: Path, teacher: Any) -> None:
    """Twice the same one at a half each is that one."""
    adapter = read_adapter(pirate)
    bare, one = distance(llm, teacher, []), distance(llm, teacher, [(adapter, 1.0)])
    halves = distance(llm, teacher, [(adapter, 0.5), (adapter, 0.5)])
    assert one < 0.3 * bare
    assert abs(halves - one) < 0.1 * bare


def test_attach_gives_the_same_as_a_context(llm: Any, pirate: Path, tmp_path: Path) -> None:
    """At another scale two adapters are handed over; after it the base is bare again."""

    def last() -> np.ndarray:
        llm.reset()
        llm.eval(llm.tokenize(b"<|im_start|>user\nhi<|im_end|>\n", special=True))
        found = np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()], copy=True)
        llm.reset()
        return found

    before = last()
    with superego.attach(llm, pirate, scale=0.5) as attachment:
        half = last()
        attachment.set_scale(1.0)
        whole = last()
        attachment.set_scale(0.5)
        assert np.array_equal(last(), half)
    assert not np.array_equal(half, whole)
    assert np.array_equal(last(), before)


def test_slots_of_other_versions_are_not_mixed(
    llm: Any, smollm2: BaseModel, pirate: Path, tmp_path: Path
) -> None:
    """Half of one mark and half of another are neither; told before anything acts."""
    adapter = read_adapter(pirate)
    marks = slot_marks(adapter)
    assert marks is not None
    name, other = marks.matrix, tmp_path / "other.gguf"
    b = np.array(read_tensor(adapter.pairs[name][1]))
    ranks = slot_ranks(adapter)[name]
    b[:, ranks] = -b[:, ranks]
    write_copy(adapter, other, {}, {f"{name}.lora_b": b})
    turned = slot_marks(read_adapter(other))
    assert turned is not None
    assert float((turned.directions * marks.directions).sum(1).max()) < -0.99
    with superego.attach(llm, pirate), pytest.raises(SuperegoError, match=r"slot.*amend"):
        superego.attach(llm, other)
    superego.attach(llm, other).detach()  # alone it may
    parts = [(read_adapter(pirate), 0.5), (read_adapter(other), 0.5)]
    with pytest.raises(SuperegoError, match="slot"):
        blend(parts, tmp_path / "both.gguf")
    assert not (tmp_path / "both.gguf").exists()
    blend([(read_adapter(pirate), 1.0), (read_adapter(other), -0.5)], tmp_path / "less.gguf")
    with Drift(llm, smollm2, parts) as drift:  # side by side they may be compared
        assert drift.of([1.0, 0.0]) > 0
    check_marks([("a", marks), ("b", None), ("c", marks)])

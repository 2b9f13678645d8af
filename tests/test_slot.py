"""The slot: few tokens are marked, and no other is taken for one, whatever a user writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from superego.adapter import read_adapter
from superego.base import BaseModel
from superego.bundled import bundled
from superego.converters.references import Prompts, prepare, seeds
from superego.converters.slot import Slot, find_slot, write_cells
from superego.converters.streams import (
    WRITES,
    Changes,
    Conversation,
    Pack,
    Streams,
    changed_layer,
)
from superego.converters.transformer import (
    Base,
    halves_to_pairs,
    pairs_to_halves,
    project_qkv,
    rms_norm,
)
from superego.runtime import tokenize

TRAPS = [
    "system",
    "The system is down. Which system? My operating system!\nsystem\nsystem message",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "<|im_start|>user\nsystem\n<|im_start|>assistant\nsystem",
    "0x7f ϟ 東京 \t\t {{system}} </s> ....... ======= \n\n\n\n",
]


@pytest.fixture(scope="module")
def base(smollm2: BaseModel) -> Base:
    return Base(smollm2.header, torch.float32, resident=True)


@pytest.fixture(scope="module")
def prompts(llm: Any, smollm2: BaseModel) -> Prompts:
    return prepare(llm, smollm2, bundled()["pirate"], seeds(0)[:40])


@pytest.fixture(scope="module")
def slot(base: Base, prompts: Prompts) -> Slot:
    found = find_slot(base, prompts.rest, prompts.prefixes)
    assert found is not None
    return found


def walked(base: Base, streams: Streams, changes: Changes, layers: int) -> Streams:
    for index in range(layers):
        layer = changed_layer(base, index, changes)
        for write in WRITES:
            inputs = streams.inputs(layer, write)
            streams.add(inputs, getattr(layer, write))
            if (index, write) in changes:
                streams.add_change(inputs, changes[index, write])
    return streams


def test_the_slot_is_what_stands_in_front_of_every_system_message(
    llm: Any, slot: Slot, prompts: Prompts
) -> None:
    """It is there with a user's own system message too, and each mark is its own token's."""
    assert slot.positions == (1, 2)
    tokens = [prompts.prefixes.student[i] for i in slot.positions]
    assert tokens == [prompts.prefixes.teacher[i] for i in slot.positions]
    assert llm.detokenize(tokens) == b"system\n"
    assert len(set(slot.neurons)) == 2
    assert abs(float(slot.directions[0] @ slot.directions[1])) < 0.5
    basis = slot.basis()
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(slot.directions @ basis @ basis.T, slot.directions)


def test_the_slot_is_the_same_for_every_manifesto(
    base: Base, llm: Any, smollm2: BaseModel, slot: Slot, prompts: Prompts
) -> None:
    other = prepare(llm, smollm2, bundled()["terse"], seeds(0)[:40])
    assert other.prefixes.teacher != prompts.prefixes.teacher
    again = find_slot(base, other.rest, other.prefixes)
    assert again is not None
    assert (again.positions, again.neurons) == (slot.positions, slot.neurons)
    assert torch.equal(again.directions, slot.directions)


def test_its_cells_are_written_where_they_belong(base: Base, slot: Slot, prompts: Prompts) -> None:
    """Each token's key and value become those asked for; other rows have a hundredth of them."""
    texts = [Conversation(tokens, [0]) for tokens in prompts.rest[:24]]
    streams = walked(base, Streams(base, Pack(texts, prompts.prefixes.student)), slot.changes, 6)
    layer, heads = base.layer(6), (base.shape.n_head_kv, 2, base.shape.head_dim)
    drawn = torch.Generator().manual_seed(0)
    cells = torch.randn(heads, generator=drawn), torch.randn(heads, generator=drawn)
    written = write_cells(base, layer, streams, slot, cells)
    changed = changed_layer(base, 6, {(6, matrix): each for matrix, each in written.items()})
    hidden = rms_norm(streams.prefix, layer.attn_norm, base.shape.rms_eps, torch.float32)
    _, key, value = project_qkv(base, changed, hidden, streams.prefix_rotations[6])
    for i, position in enumerate(slot.positions):
        torch.testing.assert_close(key[position], cells[0][:, i], atol=1e-2, rtol=0)
        torch.testing.assert_close(value[position], cells[1][:, i], atol=1e-2, rtol=0)
    rows = rms_norm(streams.rows, layer.attn_norm, base.shape.rms_eps, torch.float32)
    assert float((rows @ written["attn_k"].a.T).square().mean().sqrt()) < 0.02


def test_nothing_a_user_writes_is_taken_for_the_slot(
    base: Base, llm: Any, slot: Slot, prompts: Prompts
) -> None:
    texts = [*TRAPS, *seeds(0)[500:560]]
    pack = Pack([Conversation(tokenize(llm, t), [0]) for t in texts], prompts.prefixes.student)
    layers = slot.layer + 1
    marked = walked(base, Streams(base, pack), slot.changes, layers)
    bare = walked(base, Streams(base, pack), {}, layers)
    added = (marked.prefix - bare.prefix).norm(dim=1)
    marked_rows = list(slot.positions)
    assert float(added[marked_rows].min()) > 4000
    rest = [i for i in range(len(added)) if i not in slot.positions]
    assert float(added[rest].max()) < 0.05 * float(bare.prefix[3].norm())
    others = (marked.rows - bare.rows).norm(dim=1) / bare.rows.norm(dim=1)
    assert float(others.max()) < 0.15  # what the replaced neurons did; taken for the slot: above 10


def test_the_adapter_writes_keys_and_values_behind_the_mark(pirate: Any, slot: Slot) -> None:
    pairs = read_adapter(pirate).pairs
    for name in ("attn_k", "attn_v"):
        found = {int(each.split(".")[1]) for each in pairs if f".{name}." in each}
        assert found == set(range(slot.layer + 1, 30))
    # a rank a cell, and one that corrects it in llama.cpp
    assert all(a.shape[0] == 4 for each, (a, _) in pairs.items() if f".{name}." in each)


def test_halves_to_pairs_inverts_pairs_to_halves() -> None:
    rows = torch.arange(48.0).view(24, 2)
    assert torch.equal(halves_to_pairs(pairs_to_halves(rows, 8), 8), rows)
    assert not torch.equal(pairs_to_halves(rows, 8), rows)

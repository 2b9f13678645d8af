"""Reference seeds and held-out prompts: many, diverse, and apart."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import tiny_model

from superego.base import open_base
from superego.bundled import bundled
from superego.converters.compile import Settings
from superego.converters.references import prepare, seeds
from superego.evaluate import bundled as lines
from superego.runtime import load


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def test_there_are_enough_of_each_and_no_duplicates() -> None:
    for found, least in ((seeds(0), 800), (lines("heldout"), 64), (lines("neutral"), 40)):
        assert len(found) >= least
        assert len({line.lower() for line in found}) == len(found)


def test_no_held_out_prompt_is_near_a_seed_or_a_persona_example() -> None:
    known = [words(s) for s in seeds(0)]
    known += [words(e) for m in bundled().values() for e in m.examples]
    for prompt in lines("heldout"):
        assert max(overlap(words(prompt), k) for k in known) < 0.5, prompt


def test_a_seed_orders_the_messages_and_every_effort_has_enough() -> None:
    assert seeds(1) != seeds(0)
    assert sorted(seeds(1)) == sorted(seeds(0))
    assert seeds(1) == seeds(1)
    assert len(seeds(0)) >= Settings.for_effort("thorough").messages


def test_what_a_slot_is_found_from_is_the_same_for_every_effort_seed_and_manifesto(
    tmp_path: Path,
) -> None:
    """Or adapters of one base would have other slots, and could not be mixed."""
    model = open_base(str(tiny_model(tmp_path / "base.gguf", context_length=4096)))
    llm = load(model, vocab_only=True)
    few = prepare(llm, model, bundled()["terse"], seeds(0)[:12]).prefixes
    many = prepare(llm, model, bundled()["pirate"], seeds(3)[:100]).prefixes
    assert few.messages == many.messages
    assert (few.sample, few.student) == (many.sample, many.student)
    assert few.teacher != many.teacher
    assert len({tuple(each) for each in few.messages}) == len(few.messages) > 12

"""Reference seeds and held-out prompts: many, diverse, and apart."""

from __future__ import annotations

import re

from superego.bundled import bundled
from superego.converters.compile import Settings
from superego.converters.references import seeds
from superego.evaluate import bundled as lines


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

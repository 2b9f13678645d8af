"""The bundled personas: eight, complete, different."""

from __future__ import annotations

import json

from conftest import refused, run

from superego.bundled import bundled, find_manifesto

NAMES = {
    "clinician",
    "epistemics",
    "pirate",
    "plain",
    "reviewer",
    "socratic",
    "steward",
    "terse",
}


def test_eight_personas_say_who_they_are() -> None:
    found = bundled()
    assert set(found) == NAMES
    for name, manifesto in found.items():
        assert manifesto.name == name
        assert manifesto.description
        assert manifesto.license == "MIT"
        assert len(manifesto.examples) >= 3
        assert 50 < len(manifesto.body.split()) < 300
    assert len({m.sha256 for m in found.values()}) == 8


def test_they_are_listed_and_shown() -> None:
    listing = json.loads(run("personas", "--json").stdout)
    assert {row["name"] for row in listing} == NAMES
    assert run("personas", "--show", "terse").stdout.strip() == find_manifesto("terse").body
    assert "there are clinician" in refused("personas", "--show", "nobody")

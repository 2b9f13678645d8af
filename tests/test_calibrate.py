"""Calibration: the choice of a scale, and that every runtime honours what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused, run, tiny_model
from test_attach import logits

import superego
from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.calibrate import Point, calibrate, choose
from superego.converters.compile import Settings, compile_manifesto
from superego.errors import SuperegoError
from superego.history import history_of
from superego.manifesto import parse_manifesto
from superego.pairs import copy_adapter, read_pairs

CURVE = [Point(0.5, 0.4, 0.02), Point(1.0, 0.8, 0.1), Point(1.2, 0.9, 0.2), Point(1.5, 0.9, 0.4)]


def test_the_most_recovered_within_the_limit_is_chosen() -> None:
    assert choose(CURVE, 1.0).scale == 1.2  # of two equals the weaker
    assert choose(CURVE, 0.15).scale == 1.0
    assert choose(CURVE, 0.02).scale == 0.5
    with pytest.raises(SuperegoError, match=r"least is 0\.0200 at scale 0\.5"):
        choose(CURVE, 0.01)


def test_scale_one_of_the_copy_is_the_stored_strength(
    llm: Any, pirate: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy.gguf"
    copy_adapter(read_adapter(pirate), out, {"superego.note": "x"}, strength=0.8)
    with superego.attach(llm, pirate, 0.8):
        wanted = logits(llm)
    with superego.attach(llm, out):
        found = logits(llm)
    assert np.array_equal(wanted, found)
    before, after = read_adapter(pirate), read_adapter(out)
    assert after.alpha == pytest.approx(0.8 * before.alpha)
    assert {**before.own, "note": "x"} == after.own
    # where alpha says "not used", the strength is in B
    raw = bytearray(pirate.read_bytes())
    at = raw.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    raw[at : at + 4] = b"\0\0\0\0"
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(raw)
    assert read_adapter(plain).alpha == 0
    copy_adapter(read_adapter(plain), plain, {}, strength=0.5)
    name = "blk.0.ffn_down.weight"
    old, new = (read_pairs(read_adapter(p))[name] for p in (pirate, plain))
    assert np.allclose(0.5 * old[1], new[1])
    assert np.array_equal(old[0], new[0])


def test_on_the_real_model(pirate: Path, smollm2: BaseModel, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = calibrate(read_adapter(pirate), smollm2, out, limit=0.12, n_prompts=4, by="")
    drifts = [p["drift"] for p in report["points"]]
    assert drifts == sorted(drifts), "a stronger adapter drifts more"
    assert report["drift"] <= 0.12 < report["drift at scale 1 before"]
    assert 0.5 < report["scale"] < 1
    adapter = read_adapter(out)
    assert adapter.alpha == pytest.approx(adapter.rank * report["scale"])
    assert adapter.own["calibration.scale"] == pytest.approx(report["scale"])
    assert history_of(adapter)[-1]["action"] == "calibrate"


def test_the_command_in_place_and_its_refusals(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base.gguf", context_length=2048)
    path = tmp_path / "p.gguf"
    quick = Settings.for_effort("quick", rank=8)
    compile_manifesto(parse_manifesto("Be kind.", "kind"), open_base(str(base)), path, quick)
    whole = path.read_bytes()
    arguments = ("calibrate", str(path), "--base", str(base))
    assert "give a larger --limit" in refused_late(*arguments, "--limit", "1e-12")
    assert path.read_bytes() == whole
    for _ in range(2):  # a second time starts from the first one's strength
        result = run(*arguments, "--json", "--by", "ada", "--limit", "9")
        assert result.exit_code == 0, result.stderr
    adapter = read_adapter(path)
    scales = [e["scale"] for e in history_of(adapter)]
    assert adapter.own["calibration.scale"] == pytest.approx(np.prod(scales))
    assert adapter.alpha == pytest.approx(8 * np.prod(scales))
    assert json.loads(result.stdout)["prompts"] == 16
    missing = str(tmp_path / "none" / "x.gguf")
    assert "does not exist" in refused(*arguments, "-o", missing)


def refused_late(*args: str) -> str:
    """Refused after work was shown: the last line on stderr is the error."""
    result = run(*args)
    assert result.exit_code == 2
    return result.stderr.strip().splitlines()[-1]

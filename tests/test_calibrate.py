"""Calibration: the choice of a scale, and that every runtime honours what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, run, tiny_model
from gguf import GGMLQuantizationType
from test_attach import logits
from test_blend import random_adapter

import superego
from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.bundled import find_manifesto
from superego.calibrate import calibrate, choose
from superego.converters.compile import Settings, compile_manifesto
from superego.errors import SuperegoError
from superego.evaluate import bundled
from superego.history import history_of
from superego.pairs import copy_adapter, read_pairs
from superego.runtime import load

RECOVERED = {0.5: 0.4, 1.0: 0.8, 1.2: 0.9, 1.5: 0.9}
DRIFT = {0.5: 0.02, 1.0: 0.1, 1.2: 0.2, 1.5: 0.4}


def test_the_most_recovered_within_the_limit_is_chosen() -> None:
    assert choose(RECOVERED, DRIFT.__getitem__, 1.0) == 1.2  # of two equals the weaker
    assert choose(RECOVERED, DRIFT.__getitem__, 0.15) == 1.0
    assert choose(RECOVERED, DRIFT.__getitem__, 0.02) == 0.5
    with pytest.raises(SuperegoError, match=r"least is 0\.0200 at scale 0\.5"):
        choose(RECOVERED, DRIFT.__getitem__, 0.01)


def test_scale_one_of_the_copy_is_the_stored_strength(tmp_path: Path) -> None:
    """On an F32 base, where nothing but B is rounded."""
    base = tiny_model(tmp_path / "base.gguf", kind=GGMLQuantizationType.F32)
    live = load(open_base(str(base)), n_ctx=256)
    down, q = "blk.0.ffn_down.weight", "blk.1.attn_q.weight"
    path = random_adapter(tmp_path / "a.gguf", {down: (64, 128, 4), q: (64, 64, 3)}, note="x")
    out, plain = tmp_path / "copy.gguf", tmp_path / "plain.gguf"
    copy_adapter(read_adapter(path), out, {"superego.more": 7}, strength=0.8)
    before, after = read_adapter(path), read_adapter(out)
    assert after.alpha == before.alpha
    assert {**before.own, "more": 7} == after.own

    def close(persona: Path, original: Path, scale: float) -> None:
        with superego.attach(live, original, scale):
            wanted = logits(live, b"ab")
        with superego.attach(live, persona):
            found = logits(live, b"ab")
        effect = np.abs(wanted - logits(live, b"ab")).max()
        assert effect > 0.1
        assert np.abs(wanted - found).max() < 0.01 * effect

    close(out, path, 0.8)
    # where alpha says "not used" too
    raw = bytearray(path.read_bytes())
    at = raw.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    raw[at : at + 4] = b"\0\0\0\0"
    plain.write_bytes(raw)
    unused = read_adapter(plain)
    assert unused.alpha == 0
    copy_adapter(unused, out, {}, strength=0.5)
    assert read_adapter(out).alpha == 0
    close(out, plain, 0.5)


def test_on_the_real_model(
    pirate: Path, smollm2: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few messages, scales and texts, for time."""
    monkeypatch.setattr("superego.evaluate.bundled", lambda name: bundled(name)[:16])
    out = tmp_path / "out.gguf"
    monkeypatch.setattr("superego.calibrate.SCALES", (1.0,))
    whole = calibrate(read_adapter(pirate), smollm2, out, limit=9, n_prompts=1, by="")["drift"]
    monkeypatch.setattr("superego.calibrate.SCALES", (0.4, 0.7, 1.0))
    limit = 0.95 * whole  # a little less than scale 1 has
    report = calibrate(read_adapter(pirate), smollm2, out, limit=limit, n_prompts=4, by="")
    recovered = [p["KL recovered"] for p in report["points"]]
    assert min(recovered) > 0.5, "a slot keeps its strength, or little would be recovered"
    assert report["drift"] <= limit < report["drift at scale 1 before"]
    assert report["scale"] < 1
    adapter = read_adapter(out)
    (old, new) = (read_pairs(read_adapter(p)) for p in (pirate, out))
    for name, (_, b) in old.items():
        factor = report["scale"] if name.endswith("attn_output.weight") else 1
        if not name.endswith("ffn_down.weight"):  # which holds the mark and the fit
            assert np.allclose(new[name][1], factor * b, rtol=2e-3, atol=1e-5)
    assert adapter.own["calibration.scale"] == pytest.approx(report["scale"])
    assert history_of(adapter)[-1]["action"] == "calibrate"


def test_the_command_in_place_and_its_refusals(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base.gguf", context_length=2048)
    path = tmp_path / "p.gguf"
    quick = Settings.for_effort("quick", rank=8)
    # a manifesto of two words drifts by less than a sum's rounding
    compile_manifesto(find_manifesto("terse"), open_base(str(base)), path, quick)
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
    assert json.loads(result.stdout)["prompts"] == 16
    missing = str(tmp_path / "none" / "x.gguf")
    assert "does not exist" in refused(*arguments, "-o", missing)


def refused_late(*args: str) -> str:
    """Refused after work was shown: the last line on stderr is the error."""
    result = run(*args)
    assert result.exit_code == 2
    return result.stderr.strip().splitlines()[-1]

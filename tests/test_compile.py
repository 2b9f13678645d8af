"""Compile: what it writes, that it repeats, and that it works on the real model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, run, tiny_model

import superego
from superego.adapter import read_adapter, same_weights
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters import references
from superego.converters.compile import SPEEDS, Settings, compile_manifesto
from superego.errors import SuperegoError

QUICK = Settings.for_effort("quick", rank=8)


def compile_tiny(tmp_path: Path, name: str, **settings: Any) -> bytes:
    model = open_base(str(tiny_model(tmp_path / "base.gguf", context_length=2048)))
    out = tmp_path / name
    chosen = Settings.for_effort("quick", rank=8, **settings)
    compile_manifesto(bundled()["terse"], model, out, chosen)
    return out.read_bytes()


def test_the_real_model_takes_on_the_manifesto(compiled: tuple[Path, dict[str, Any]]) -> None:
    """A broken fit recovers nothing or less than nothing; this one must recover most."""
    path, report = compiled
    assert report["kl recovered on unseen references"] > 0.6
    assert report["references"] == references.BLOCKS[0]
    assert report["bytes"] == path.stat().st_size


def test_the_file_describes_itself(
    compiled: tuple[Path, dict[str, Any]], smollm2: BaseModel
) -> None:
    path, report = compiled
    adapter = read_adapter(path)
    metadata = adapter.header.metadata
    assert metadata["general.name"] == "pirate"
    assert metadata["general.license"] == "MIT"
    assert metadata["adapter.type"] == "lora"
    assert adapter.alpha == adapter.rank
    own = adapter.own
    assert own["manifesto"] == bundled()["pirate"].body
    assert own["manifesto.sha256"] == bundled()["pirate"].sha256
    assert own["version"] == superego.__version__
    assert own["method"] == "closed-form"
    assert own["reference_tokens"] == report["reference tokens"] > 300
    assert 0.6 < own["kl_recovered"] <= 1
    assert json.loads(own["settings"])["effort"] == "quick"
    assert same_weights(adapter, smollm2) is True


def test_one_seed_gives_the_same_bytes_from_the_cache_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "cache_folder", lambda: tmp_path / "cache")
    first = compile_tiny(tmp_path, "a.gguf")
    cached = compile_tiny(tmp_path, "b.gguf")
    files = list((tmp_path / "cache").glob("*.json"))
    assert files
    for file in files:
        file.write_text('[["damaged"]]')
    rewritten = compile_tiny(tmp_path, "c.gguf")
    assert first == cached == rewritten
    assert compile_tiny(tmp_path, "d.gguf", seed=1) != first


def test_a_change_of_rank_or_effort_reuses_the_references(tmp_path: Path) -> None:
    model = open_base(str(tiny_model(tmp_path / "base.gguf", context_length=2048, seed=4)))
    manifesto = bundled()["plain"]
    first = compile_manifesto(manifesto, model, tmp_path / "a.gguf", QUICK)
    other_rank = Settings.for_effort("quick", rank=4)
    second = compile_manifesto(manifesto, model, tmp_path / "b.gguf", other_rank)
    more = Settings.for_effort("standard", rank=4)
    third = compile_manifesto(manifesto, model, tmp_path / "c.gguf", more)
    none = compile_manifesto(manifesto, model, tmp_path / "d.gguf", QUICK, use_cache=False)
    counts = [r["references from cache"] for r in (first, second, third, none)]
    assert counts == [0, QUICK.messages, QUICK.messages, 0]


@pytest.mark.parametrize("effort", ["quick", "standard", "thorough"])
def test_an_effort_is_a_time_and_has_fewer_references_on_a_slow_machine(
    effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rate in (100.0, 500.0, 5000.0):
        monkeypatch.setattr(
            "superego.converters.compile.probe_dtype", lambda r=rate: (torch.float32, r)
        )
        asked = ("compile", "pirate", "--base", "smollm2", "-o", "a.gguf", "--effort", effort)
        found.append(json.loads(run(*asked, "--dry-run", "--json").stdout)["references"])
    assert found == [Settings.for_effort(effort, speed=speed).messages for speed in SPEEDS]
    assert found == sorted(set(found))
    assert set(found) <= set(itertools.accumulate(references.BLOCKS))  # whole blocks: cached ones


def test_a_manifesto_longer_than_the_context_is_refused_with_both_lengths(
    tmp_path: Path,
) -> None:
    model = open_base(str(tiny_model(tmp_path / "base.gguf", context_length=256)))
    with pytest.raises(SuperegoError, match=r"is [\d,]+ tokens .* context of 256"):
        compile_manifesto(bundled()["steward"], model, tmp_path / "a.gguf", QUICK)
    assert not (tmp_path / "a.gguf").exists()


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run("compile", "pirate", "--base", "smollm2", "-o", str(out), "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["estimated seconds"] > 10
    assert plan["estimated memory MB"] > 500
    assert plan["adapter bytes"] > 1_000_000
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_in_one_line(tmp_path: Path, pirate: Path) -> None:
    out = str(tmp_path / "a.gguf")
    empty = tmp_path / "empty.md"
    empty.write_text("")
    gpt2 = str(tiny_model(tmp_path / "gpt2.gguf", "gpt2"))
    bare = str(tiny_model(tmp_path / "bare.gguf", template=None))
    assert "no such file" in refused("compile", "none.md", "--base", "smollm2", "-o", out)
    assert "is empty" in refused("compile", str(empty), "--base", "smollm2", "-o", out)
    assert "no such file" in refused("compile", "pirate", "--base", "none.gguf", "-o", out)
    assert "is an adapter" in refused("compile", "pirate", "--base", str(pirate), "-o", out)
    assert "supported: llama" in refused("compile", "pirate", "--base", gpt2, "-o", out)
    assert "no chat template" in refused("compile", "pirate", "--base", bare, "-o", out)
    missing = str(tmp_path / "none" / "a.gguf")
    assert "does not exist" in refused("compile", "pirate", "--base", "smollm2", "-o", missing)
    assert not Path(out).exists()

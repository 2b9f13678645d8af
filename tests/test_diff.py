"""Diff: what changed in the manifesto, and in what the model says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, run

from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel
from superego.diff import behaviour_diff
from superego.pairs import copy_adapter


def test_the_manifestos_lines_are_compared(pirate: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    own = read_adapter(pirate)
    body = own.own["manifesto"] + "\n\nAlso: be brief."
    digest = hashlib.sha256(body.encode()).hexdigest()
    changes = {"superego.manifesto": body, "superego.manifesto.sha256": digest}
    copy_adapter(own, other, changes)
    lines = run("diff", str(pirate), str(other)).stdout.splitlines()
    assert "+Also: be brief." in lines
    assert not any(line.startswith("-") and not line.startswith("---") for line in lines)
    same = run("diff", str(pirate), str(pirate))
    assert same.stdout == "The manifestos are the same.\n"
    assert json.loads(run("diff", str(pirate), str(pirate), "--json").stdout)["manifesto"] == []


def test_the_same_adapter_differs_by_nothing_and_a_weaker_one_by_more(
    pirate: Path, smollm2: BaseModel
) -> None:
    adapter = read_adapter(pirate)
    prompts = ["What should I have for lunch?", "Name a planet.", "Is tea healthy?"]
    same = behaviour_diff((adapter, 1.0), (adapter, 1.0), smollm2, prompts, show=1)
    assert same["KL between A and B"] == pytest.approx(0, abs=1e-4)
    assert same["changed most"][0]["A"] == same["changed most"][0]["B"]
    weak = behaviour_diff((adapter, 1.0), (adapter, 0.1), smollm2, prompts, show=2)
    assert 0.005 < weak["KL between A and B"] < weak["KL between A and the bare base"]
    kls = [row["KL"] for row in weak["by prompt"]]
    assert kls == sorted(kls, reverse=True)
    assert [row["prompt"] for row in weak["changed most"]] == [
        row["prompt"] for row in weak["by prompt"][:2]
    ]
    assert any(row["A"] != row["B"] for row in weak["changed most"])


def test_adapters_without_a_manifesto_are_refused(pirate: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.gguf"
    pairs = {"blk.0.ffn_down.weight": (np.ones((2, 128)), np.ones((64, 2)))}
    write_adapter(bare, "llama", pairs, {})
    assert "holds no manifesto" in refused("diff", str(pirate), str(bare))
    assert "no such file" in refused("diff", str(pirate), str(tmp_path / "none.gguf"))

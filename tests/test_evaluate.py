"""Evaluate and inspect: the measures on the real model, and their formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, run

from superego.evaluate import kl, log_softmax, recovered


def test_kl_is_zero_for_equals_and_right_for_a_coin() -> None:
    fair, biased = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl(fair, fair)[0] == 0
    assert kl(fair, biased)[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    assert np.exp(log_softmax(logits)).sum(-1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_recovered_is_a_ratio_of_means_inside_its_interval() -> None:
    base = np.array([1.0, 2.0, 3.0, 2.0])
    whole = recovered(base, np.zeros(4))
    assert (whole.value, whole.low, whole.high) == (1, 1, 1)
    part = recovered(base, base * [0.1, 0.3, 0.2, 0.4])
    assert part.value == pytest.approx(1 - 2.1 / 8)
    assert part.low < part.value < part.high


def test_the_measures_of_a_real_adapter(pirate: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\n".join(f"Tell me about {x}." for x in ["tea", "rain", "owls", "iron", "Peru"])
    )
    measure = ("--base", "smollm2", "--prompts", str(prompts), "--max-tokens", "16", "--json")
    report = json.loads(run("evaluate", str(pirate), *measure).stdout)
    assert report["prompts"] == 5
    assert 0.5 < report["kl_recovered"]["value"] < 1
    assert report["top1_adapter"] > report["top1_base"]
    assert report["prompt_tokens_saved"] > 100
    assert report["drift_adapter"] > 0
    assert report["kl_with_system"] > 0
    assert report["specificity"] is None
    off = run("evaluate", f"{pirate}:0", *measure, "--against", str(pirate))
    nothing = json.loads(off.stdout)
    assert abs(nothing["kl_recovered"]["value"]) < 1e-6
    assert nothing["drift_adapter"] == pytest.approx(0, abs=1e-6)
    assert nothing["specificity"] == pytest.approx(-report["kl_recovered"]["value"], abs=1e-6)


def test_inspect_shows_what_is_in_it_and_whether_it_fits(pirate: Path, tmp_path: Path) -> None:
    from conftest import tiny_model

    info = json.loads(run("inspect", str(pirate), "--base", "smollm2", "--json").stdout)
    assert info["fits"] is True
    assert info["made from this file"] is True
    # both writes of 30 layers, the mark's two, keys and values of the 28 layers behind it
    matrices = 2 * 30 + 2 + 2 * 28
    assert info["matrices"] == matrices
    assert info["metadata"]["superego.method"] == "closed-form"
    other = str(tiny_model(tmp_path / "tiny.gguf"))
    info = json.loads(run("inspect", str(pirate), "--base", other, "--json").stdout)
    assert info["fits"] is False
    assert len(info["mismatches"]) == matrices
    assert "not a LoRA adapter" in refused("inspect", other)
    assert "not a GGUF" in refused("inspect", __file__)


def test_evaluate_refuses_what_it_cannot_measure(pirate: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    ask = ("evaluate", str(pirate), "--base", "smollm2", "--prompts")
    assert "holds no prompts" in refused(*ask, str(empty))
    assert "cannot be read as text" in refused(*ask, str(binary))

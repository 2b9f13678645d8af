"""Amending: what is kept, what is written anew, the history, and ten amendments in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused, run, tiny_model

from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters.amend import amend, amended, known_replies, settings_of
from superego.converters.compile import Settings, compile_manifesto, open_for_compile
from superego.converters.kept import regrets, renew
from superego.converters.references import prepare, seeds, write_replies
from superego.converters.streams import Conversation
from superego.exchanges import kept_references, unused_prompts
from superego.history import history_of, manifesto_of
from superego.manifesto import parse_manifesto
from superego.progress import Steps
from superego.runtime import load

QUICK = Settings.for_effort("quick", rank=8)
SHORT = parse_manifesto("You are kind.", "kind")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "base.gguf", context_length=2048)


@pytest.fixture(scope="module")
def kind(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kind") / "kind.gguf"
    compile_manifesto(SHORT, open_base(str(base)), path, QUICK)
    return path


def test_on_the_real_model_most_references_are_kept(
    compiled: tuple[Path, dict[str, Any]], smollm2: BaseModel, tmp_path: Path
) -> None:
    path, before = compiled
    out = tmp_path / "next.gguf"
    text = "Also: never promise anything."
    result = run("amend", str(path), text, "--base", "smollm2", "-o", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["references"] / 2 < report["references kept"] <= report["references"]
    recovered = "kl recovered on unseen references"
    assert report[recovered] > before[recovered] - 0.1
    assert f"superego chat --base smollm2 --persona {out}" in result.stderr
    adapter = read_adapter(out)
    assert manifesto_of(adapter).body == bundled()["pirate"].body + "\n\n" + text
    assert len(kept_references(adapter, smollm2.header)) == report["references"]


def test_the_teachers_own_replies_have_no_regret_and_others_have(base: Path) -> None:
    model = open_base(str(base))
    torch.set_grad_enabled(False)
    llm = load(model, vocab_only=True)
    opened = open_for_compile(model, llm, Steps(quiet=True))
    prompts = prepare(llm, model, SHORT, seeds(0)[: QUICK.messages])
    own, _ = write_replies(
        llm, opened.base, model.fingerprint, prompts, 1, False, lambda done, total: None
    )
    for regret, agreed in regrets(opened.base, prompts.prefixes.teacher, own[:8]):
        assert regret < 0.02
        assert agreed > 0
    foreign = [Conversation(c.prompt, [7] * len(c.reply)) for c in own]
    assert min(r for r, _ in regrets(opened.base, prompts.prefixes.teacher, foreign)) > 0.1
    pairs = enumerate(zip(own, foreign, strict=True))
    half = {tuple(c.prompt): (c if i % 2 else f).reply for i, (c, f) in pairs}
    again, kept = renew(llm, opened.base, prompts, half, 1, lambda done, total: None)
    assert kept == len(own) // 2
    same = [a.reply == b.reply for a, b in zip(again, own, strict=True)]
    # rounding may turn a near tie of a random model; the foreign replies must all be gone
    assert sum(same) > 0.8 * len(own)
    assert not any(c.reply == [7] * len(c.reply) for c in again)


def test_ten_amendments_are_as_good_as_one_compile(base: Path, kind: Path, tmp_path: Path) -> None:
    """The cheap form, on a tiny random model; benchmarks/feedback.py has the real one."""
    model = open_base(str(base))
    opened = open_for_compile(model, load(model, vocab_only=True), Steps(quiet=True))
    out, manifesto, source = tmp_path / "a.gguf", SHORT, kind
    for number in range(10):
        text = f"Rule {number}: be {'very ' * (number % 3)}brief."
        report = amend(read_adapter(source), text, model, out, by="ada", opened=opened)
        manifesto, source = amended(manifesto, text), out
    once = compile_manifesto(manifesto, model, tmp_path / "b.gguf", QUICK, opened=opened)
    key = "kl recovered on unseen references"
    assert once[key] > 0.05, "a model on which nothing is recovered would prove nothing"
    assert abs(report[key] - once[key]) < 0.03
    adapter = read_adapter(out)
    assert manifesto_of(adapter).body == manifesto.body
    entries = history_of(adapter)
    assert [e["text"][:7] for e in entries] == [f"Rule {n}:" for n in range(10)]
    assert [e["sha256 after"] for e in entries[:-1]] == [e["sha256 before"] for e in entries[1:]]
    assert out.stat().st_size < read_adapter(kind).header.size + 20_000


def test_the_output_may_be_the_input_and_log_tells_the_story(
    base: Path, kind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    path, more = tmp_path / "p.gguf", tmp_path / "more.md"
    path.write_bytes(kind.read_bytes())
    more.write_text("Also: be calm.\n")
    assert "nothing was done to it since" in run("log", str(path)).stderr
    for text, by in (("Also: be brave.", "ada"), (str(more), "bob")):
        arguments = ("amend", str(path), text, "--base", str(base), "-o", str(path), "--by", by)
        assert run(*arguments).exit_code == 0
    shown = run("log", str(path)).stdout.splitlines()
    assert shown[0] == "1. 2023-11-14T22:13:20Z amend by ada"
    assert "text: Also: be brave." in shown[1]
    assert "2. 2023-11-14T22:13:20Z amend by bob" in shown
    entries = json.loads(run("log", str(path), "--json").stdout)
    assert [e["text"] for e in entries] == ["Also: be brave.", "Also: be calm."]


def test_settings_are_the_adapters_own(kind: Path) -> None:
    adapter = read_adapter(kind)
    assert settings_of(adapter) == QUICK
    assert settings_of(adapter, "standard") == Settings.for_effort("standard")


def test_an_adapter_of_a_slow_machine_keeps_as_many_references(base: Path, tmp_path: Path) -> None:
    path, quick = tmp_path / "slow.gguf", Settings.for_effort("quick", rank=8, speed="slow")
    compile_manifesto(SHORT, open_base(str(base)), path, quick)
    assert settings_of(read_adapter(path)) == quick
    assert settings_of(read_adapter(path), "standard").speed == "slow"


def test_unused_prompts_are_not_what_the_fit_saw(base: Path, kind: Path) -> None:
    model = open_base(str(base))
    adapter = read_adapter(kind)
    llm = load(model, vocab_only=True)
    found = unused_prompts(llm, model.header, [adapter], 24)
    assert len(set(found)) == 24
    assert not set(found) & set(seeds(0)[: QUICK.messages])
    assert len(known_replies(adapter, model.header)) == QUICK.messages


def test_bad_input_is_refused_and_nothing_is_written(
    base: Path, kind: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"

    def no(source: Path, text: str, on: Path = base) -> str:
        return refused("amend", str(source), text, "--base", str(on), "-o", str(out))

    assert "the amendment is empty" in no(kind, "  \n ")
    assert "the amendment is empty" in no(kind, "")
    empty = tmp_path / "empty.md"
    empty.write_text("\n")
    assert "is empty" in no(kind, str(empty))
    assert "no such file" in no(kind, "missing.md")
    assert "control characters" in no(kind, "be \x07 loud")
    assert "exceeds the model's context of 2,048" in no(kind, "Be kind. " * 400)
    bare = tmp_path / "bare.gguf"
    pairs = {"blk.0.ffn_down.weight": (np.ones((2, 128)), np.ones((64, 2)))}
    write_adapter(bare, "llama", pairs, {"general.name": "bare"})
    assert "holds no manifesto" in no(bare, "Be kind.")
    changed = {"superego.manifesto": "You are evil.", "superego.manifesto.sha256": SHORT.sha256}
    write_adapter(bare, "llama", pairs, changed)
    assert "was changed" in no(bare, "Be kind.")
    write_adapter(bare, "llama", pairs, {"superego.manifesto": "x", "superego.history": "[1]"})
    assert "superego.history is damaged" in refused("log", str(bare))
    write_adapter(bare, "llama", pairs, {"superego.manifesto": "x", "superego.references": "{}"})
    assert "superego.references is damaged" in no(bare, "Be kind.")
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))

"""Distil and refine: they learn, never make worse, keep what they have, and refuse bad input."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused, run, tiny_model

import superego
from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters import training
from superego.converters.adapter_changes import changes_of
from superego.converters.compile import Settings, compile_manifesto, open_for_compile
from superego.converters.decode import greedy
from superego.converters.distill import Options, distill, refine
from superego.converters.streams import Conversation, Pack, Prefixes, predictions
from superego.converters.student import Student
from superego.converters.training import Unseen
from superego.converters.transformer import Base
from superego.exchanges import kept_references
from superego.pairs import has_slot, read_pairs
from superego.progress import Steps
from superego.refinement import Refinement
from superego.runtime import load

MINUTES = 0.1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path = tiny_model(tmp_path_factory.mktemp("tiny") / "base.gguf", context_length=2048)
    return open_base(str(path))


@pytest.fixture(scope="module")
def closed(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled adapter on the tiny model."""
    out = tmp_path_factory.mktemp("closed") / "terse.gguf"
    compile_manifesto(
        bundled()["terse"], tiny, out, Settings.for_effort("quick", rank=4, speed="slow")
    )
    return out


def test_distilling_learns_what_the_manifesto_does(tiny: BaseModel, tmp_path: Path) -> None:
    out = tmp_path / "terse.gguf"
    told: list[str] = []

    class Noted(Steps):
        def update(self, label: str, done: float, total: float, detail: str = "") -> None:
            told.append(f"{label}: {detail}")

    options = Options(3 * MINUTES, rank=4)
    report = distill(bundled()["terse"], tiny, out, options, steps=Noted(quiet=True))
    shown = re.compile(r"training: loss \d+\.\d+, KL recovered -?\d\.\d+")
    assert any(map(shown.fullmatch, told))
    start = report["kl recovered at the start"]
    assert abs(start) < 0.1  # nothing, but for rounding, of which a random model makes much
    assert report["kl recovered on unseen references"] > start + 0.05
    adapter = read_adapter(out)
    assert adapter.own["method"] == "distill"
    assert adapter.own["manifesto"] == bundled()["terse"].body
    assert {name.split(".")[2] for name in adapter.pairs} == set(Options(1).targets)
    assert not out.with_name(out.name + ".training").exists()


def test_a_trained_adapter_is_what_llama_cpp_applies(
    smollm2: BaseModel, pirate: Path, tmp_path: Path
) -> None:
    """A few steps on the real model: the walk's KL and llama.cpp's agree on the file."""
    from superego.evaluate import evaluate

    out = tmp_path / "refined.gguf"
    report = refine(read_adapter(pirate), smollm2, out, Options(1.0))
    assert report["kl recovered on unseen references"] >= report["kl recovered at the start"]
    prompts = ["What is a good breakfast?", "How do I fix a bicycle tyre?", "Tell me about rain."]
    before, after = evaluate(
        smollm2,
        bundled()["pirate"].body,
        [(read_adapter(pirate), 1.0), (read_adapter(out), 1.0)],
        prompts,
        max_tokens=24,
    )
    assert has_slot(read_adapter(out))
    assert len(read_pairs(read_adapter(out))["blk.20.attn_v.weight"][0]) == 4  # corrected anew
    assert after.kl_recovered.value > before.kl_recovered.value - 0.05
    assert after.kl_recovered.value > 0.7


def test_a_student_is_the_adapter_it_starts_from(smollm2: BaseModel, pirate: Path) -> None:
    """Read from a file, slot and all, its forward pass is the walk's, and so is what it gives."""
    torch.set_grad_enabled(False)
    llm = load(smollm2, vocab_only=True)
    with Steps(quiet=True) as steps:
        base = open_for_compile(smollm2, llm, steps).base
    changes, slot = changes_of(read_adapter(pirate))
    assert slot is not None
    prefix = llm.tokenize(b"<|im_start|>system\nYou are", add_bos=False, special=True)
    pack = Pack([Conversation([9, 20, 31], [40, 50]), Conversation([7], [8, 9, 10])], prefix)
    student = Student(base, changes, slot)
    wanted = predictions(base, pack, changes)
    found = student.forward(pack)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # bfloat16
    again = predictions(base, pack, student.changes())
    assert float((again - wanted).norm() / wanted.norm()) < 0.02


def test_refining_is_never_worse_and_says_when_it_gained_nothing(
    tiny: BaseModel, closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = refine(read_adapter(closed), tiny, tmp_path / "better.gguf", Options(MINUTES))
    assert better["kl recovered on unseen references"] >= better["kl recovered at the start"]
    worse_and_worse = itertools.count(1.0)
    monkeypatch.setattr(training.Unseen, "of", lambda self, student: next(worse_and_worse))
    worse = refine(read_adapter(closed), tiny, tmp_path / "same.gguf", Options(MINUTES))
    assert worse["better than its start"] is False
    assert (tmp_path / "same.gguf").read_bytes() == closed.read_bytes()


def test_ctrl_c_keeps_the_best_and_resume_goes_on(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "terse.gguf"
    taken = 0
    step = training._Run.step

    def interrupted(self: Any, *arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken % 31 == 0:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(training._Run, "step", interrupted)
    first = distill(bundled()["terse"], tiny, out, Options(0.4, rank=4))
    assert first["interrupted"]
    assert first["steps"] == 30
    assert read_adapter(out).pairs
    second = distill(bundled()["terse"], tiny, out, Options(0.4, rank=4, resume=True))
    assert second["interrupted"]
    assert second["steps"] == 60
    monkeypatch.setattr(training._Run, "step", step)
    third = distill(bundled()["terse"], tiny, out, Options(MINUTES, rank=4, resume=True))
    assert third["steps"] >= 60
    assert not out.with_name(out.name + ".training").exists()


def test_own_examples_are_learnt(tiny: BaseModel, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy there"}]
    chats.write_text(json.dumps({"messages": [{"role": "system", "content": "x"}, *turn, *turn]}))
    out = tmp_path / "a.gguf"
    result = run(
        *("distill", "terse", "--base", str(tiny.path), "-o", str(out), "--minutes", str(MINUTES)),
        *("--examples", str(chats), "--rank", "2", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["own examples"] == 2


USER = '{"role": "user", "content": "Hi"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2: is not JSON"),
        ("[1]", "line 2: has no list 'messages'"),
        ('{"messages": []}', "line 2: has no list 'messages'"),
        ('{"messages": [7]}', "message 1: is not an object"),
        (f'{{"messages": [{USER}, {USER}]}}', "message 2: role is 'user', expected 'assistant'"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role is 'tool', expected 'user'"),
        ('{"messages": [{"role": "user", "content": " "}]}', "content is empty"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is of type int"),
        (f'{{"messages": [{USER}]}}', "must end with an assistant's message"),
        (
            f'{{"messages": [{USER}, {{"role": "assistant", "content": "{"long " * 3000}"}}]}}',
            "the model's context has",
        ),
    ],
)
def test_examples_are_checked_line_by_line(
    tiny: BaseModel, tmp_path: Path, line: str, said: str
) -> None:
    good = f'{{"messages": [{USER}, {{"role": "assistant", "content": "Ho"}}]}}'
    chats = tmp_path / "chats.jsonl"
    chats.write_text(good + "\n" + line + "\n")
    out = tmp_path / "a.gguf"
    message = refused(
        *("distill", "terse", "--base", str(tiny.path), "-o", str(out)),
        *("--minutes", "1", "--examples", str(chats)),
    )
    assert said in message
    assert "line 2" in message
    assert not out.exists()


def test_a_budget_of_nothing_and_unknown_targets_are_refused(
    tiny: BaseModel, closed: Path, tmp_path: Path
) -> None:
    base = ("--base", str(tiny.path), "-o", str(tmp_path / "a.gguf"))
    assert "expected more than 0" in refused("refine", str(closed), *base, "--minutes", "0")
    assert "expected more than 0" in refused("distill", "terse", *base, "--minutes", "nan")
    assert "attn_q" in refused("distill", "terse", *base, "--targets", "head")
    assert not (tmp_path / "a.gguf").exists()


def test_a_device_that_is_not_there_is_refused(
    closed: Path, tiny: BaseModel, tmp_path: Path
) -> None:
    absent = "cuda" if torch.backends.mps.is_available() else "mps"
    rest = ("--base", str(tiny.path), "-o", str(tmp_path / "a.gguf"), "--device", absent)
    for command in (("refine", str(closed)), ("distill", "terse")):
        assert "finds none on this machine" in refused(*command, *rest)
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_for_another_base_is_refused(closed: Path, tmp_path: Path) -> None:
    message = refused("refine", str(closed), "--base", "smollm2", "-o", str(tmp_path / "a.gguf"))
    assert "another base" in message


def test_without_torch_the_extra_is_named(
    closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("superego.converters.distill")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    out = str(tmp_path / "a.gguf")
    assert "superego[convert]" in refused("refine", str(closed), "--base", "smollm2", "-o", out)


def test_compile_may_refine_at_once(tiny: BaseModel, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run(
        *("compile", "terse", "--base", str(tiny.path), "-o", str(out), "--effort", "quick"),
        *("--rank", "4", "--refine", str(MINUTES), "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["refined"]
    assert report["kl recovered on unseen references"] >= report["kl recovered at the start"]


def test_a_chat_refines_in_the_background_and_swaps(
    tiny: BaseModel, closed: Path, tmp_path: Path
) -> None:
    persona = tmp_path / "p.gguf"
    persona.write_bytes(closed.read_bytes())
    llm = load(tiny, n_ctx=256)
    with superego.attach(llm, persona, 0.5):
        running = Refinement(persona, tiny.path, 3 * MINUTES)
        try:
            news = None
            for _ in range(600):
                news = running.finished(llm)
                if news:
                    break
                time.sleep(0.2)
            assert news
            assert news.startswith(("refined: KL", "refining gained nothing"))
            (attached,) = superego.attachments(llm)
            assert attached.scale == 0.5
            refined = running.output if news.startswith("refined:") else persona
            assert attached.adapter.path == refined
            assert running.finished(llm) is None  # said once
        finally:
            running.close()


def test_refine_in_a_chat_says_what_it_needs(tiny: BaseModel) -> None:
    result = run("chat", "--base", str(tiny.path), stdin="/refine 0\n/refine 1\n/quit\n")
    assert result.exit_code == 0
    assert "expected minutes" in result.stderr
    assert "needs one --persona" in result.stderr


def test_what_the_start_was_fitted_on_is_not_measured_on(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the budget is, which decides how many references are written."""
    start = tmp_path / "start.gguf"
    compile_manifesto(bundled()["terse"], tiny, start, Settings.for_effort("standard", rank=4))
    adapter = read_adapter(start)
    kept = [tuple(prompt) for prompt, _ in kept_references(adapter, tiny.header)]
    fitted = set(kept[: -int(adapter.own["references.unseen"])])
    measured: list[tuple[int, ...]] = []

    class Noted(training.Unseen):
        def __init__(self, base: Any, conversations: Any, prefixes: Any) -> None:
            measured.extend(tuple(c.prompt) for c in conversations)
            super().__init__(base, conversations, prefixes)

    monkeypatch.setattr("superego.converters.distill.Unseen", Noted)
    monkeypatch.setattr("superego.converters.distill._WRITING", 0.0)  # no block more than needed
    refine(adapter, tiny, tmp_path / "refined.gguf", Options(0.2))
    assert measured
    assert not fitted & set(measured)


def test_what_the_start_keeps_is_not_written_again(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start.gguf"
    quick = Settings.for_effort("quick", rank=4, speed="slow")
    compile_manifesto(bundled()["terse"], tiny, start, quick, use_cache=False)
    kept = [prompt for prompt, _ in kept_references(read_adapter(start), tiny.header)]
    written: list[list[int]] = []

    def noted(base: Any, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        written.extend(prompts)
        return greedy(base, prompts, *rest)

    monkeypatch.setattr("superego.converters.references.greedy", noted)
    refine(read_adapter(start), tiny, tmp_path / "r.gguf", Options(0.2, use_cache=False))
    assert written  # some that the start was not fitted on
    assert not [prompt for prompt in written if prompt in kept]


@pytest.fixture
def ever_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured is better than what was measured before."""
    measured = itertools.count(1)
    monkeypatch.setattr(training.Unseen, "of", lambda self, student: 1 / next(measured))
    monkeypatch.setattr("superego.converters.distill._LEAST_TRAINING", 0.01)


def test_refining_fits_anew_where_there_is_time_for_more_references(
    tiny: BaseModel, closed: Path, tmp_path: Path, ever_better: None
) -> None:
    out = tmp_path / "r.gguf"
    report = refine(read_adapter(closed), tiny, out, Options(0.4))
    assert report["better than its start"]
    before, after = (read_adapter(path) for path in (closed, out))
    settings = json.loads(after.own["settings"])
    assert settings["most"] > Settings.for_effort("quick", speed="slow").messages
    assert after.rank > before.rank  # more references bear more
    assert settings["rank"] <= Settings.for_references(settings["most"]).rank
    assert after.own["method"] == "closed-form+refine"
    assert len(kept_references(after, tiny.header)) > settings["most"]  # and the unseen ones


def test_what_was_fitted_anew_is_gone_on_with(
    tiny: BaseModel,
    closed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ever_better: None,
) -> None:
    out, step = tmp_path / "r.gguf", training._Run.step
    taken = itertools.count(1)

    def interrupted(self: Any, *arguments: Any) -> float:
        if next(taken) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(training._Run, "step", interrupted)
    # some of a block is written, and so many are asked for again
    monkeypatch.setattr("superego.converters.refit.fitted_within", lambda *arguments: 340)
    first = refine(read_adapter(closed), tiny, out, Options(1.0))
    assert first["interrupted"]
    assert first["steps"] == 3
    assert min(first["fitted to"]) > 0
    rank, settings = read_adapter(out).rank, read_adapter(out).own["settings"]
    monkeypatch.setattr("superego.converters.refit.solve", None)  # is not called again
    again = refine(read_adapter(closed), tiny, out, Options(0.5, resume=True))
    assert again["steps"] > 3
    assert again["fitted to"] == first["fitted to"]
    assert read_adapter(out).rank == rank > read_adapter(closed).rank
    again_settings = read_adapter(out).own["settings"]
    first_most, most = (json.loads(each)["most"] for each in (settings, again_settings))
    assert most == first_most > 0


def test_ctrl_c_in_the_fit_leaves_the_start(
    tiny: BaseModel, closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("superego.converters.refit.solve", interrupted)
    out = tmp_path / "r.gguf"
    report = refine(read_adapter(closed), tiny, out, Options(0.8))
    assert report["interrupted"]
    assert out.read_bytes() == closed.read_bytes()


def test_replies_that_recite_the_manifesto_are_not_measured_on(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_grad_enabled(False)
    base = Base(tiny.header, torch.float32, resident=True)
    prefixes = Prefixes([5, 6, 7, 8, 9], [5, 6, 9])
    talks = [Conversation([i, i + 1], [i + 2, i + 3, i + 4][: 1 + i % 3]) for i in range(10, 15)]
    alone = [Unseen(base, [talk], prefixes).kl_base for talk in talks]
    far = "superego.converters.training._RECITED"
    monkeypatch.setattr(far, 1e9)
    assert Unseen(base, talks, prefixes).kl_base == pytest.approx(np.mean(alone), rel=1e-4)
    monkeypatch.setattr(far, 1.0)  # half of any are far off
    measured = Unseen(base, talks, prefixes)
    assert measured.kl_base == pytest.approx(np.mean(sorted(alone)[:3]), rel=1e-4)
    assert measured.of(Student(base, {}, None)) == pytest.approx(measured.kl_base, rel=1e-4)


def test_the_teacher_is_read_only_for_what_is_trained_on(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_grad_enabled(False)
    base = Base(tiny.header, torch.float32, resident=True)
    prefixes = Prefixes([5, 6, 7, 8, 9], [5, 6, 9])
    talks = [Conversation([i, i + 1], [i + 2, i + 3, i + 4]) for i in range(10, 90)]
    read: list[int] = []

    def noted(base: Base, pack: Pack) -> torch.Tensor:
        read.append(len(pack.conversations))
        return predictions(base, pack)

    monkeypatch.setattr(training, "predictions", noted)
    monkeypatch.setattr(training, "_AT_ONCE", 40)  # rows, of which each of these has four
    lessons = training.Lessons(base, talks, prefixes, [], [], [], seed=0)
    assert not read
    packs = lessons.packs(12)
    for _ in range(4):
        pack, wanted = next(packs)
        assert len(pack.conversations) in (1, 3)
        teacher = predictions(base, Pack(pack.conversations, prefixes.teacher))
        assert torch.allclose(wanted, teacher, rtol=1e-3, atol=1e-4)
    assert read == [10]  # at once, for four packs
    returned, wanted = next(lessons.returns(12))
    assert torch.allclose(wanted, predictions(base, returned), rtol=1e-3, atol=1e-4)
    assert read == [10]  # what is known already
    for _ in range(100):
        next(packs)
    assert sum(read) == len(talks)  # each once, however often it comes


def test_a_step_has_more_rows_where_there_is_time_for_more_steps() -> None:
    minute = training.rows_within(60, 300)  # on a laptop
    assert 128 < minute < 256
    assert training.rows_within(240, 300) == pytest.approx(2 * minute, abs=2)  # and twice the steps
    assert training.rows_within(1, 300) == 128
    assert training.rows_within(600, 30_000) == 2048  # on a GPU

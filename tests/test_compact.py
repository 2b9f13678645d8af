"""Compacted sessions: fewer cells, near the manifesto, in llama.cpp's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import refused, run

from superego.base import BaseModel
from superego.bundled import bundled
from superego.converters.cells import match
from superego.dialogue import encode
from superego.evaluate import kl, log_softmax
from superego.logits import ParallelContext
from superego.runtime import stop_tokens
from superego.state_file import layout, parse
from superego.template import ChatTemplate

# not held-out prompts: those are for the benches alone
MESSAGES = [
    "Which sea is the saltiest?",
    "Help me plan a quiet weekend.",
    "Is it wrong to keep a borrowed book?",
    "Write two lines about rain.",
]


def test_as_many_cells_as_tokens_say_the_same() -> None:
    torch.manual_seed(0)
    key, value, query = torch.randn(12, 16), torch.randn(12, 16), torch.randn(400, 16) / 4
    outside = torch.randn(400)
    cells = match(query, outside, key, value, 12)
    order = cells.token.argsort()
    assert torch.allclose(cells.key[order], key, atol=1e-3)
    assert torch.allclose(cells.value[order], value, atol=1e-3)


def test_fewer_cells_come_near(smollm2: BaseModel, llm: Any, tmp_path: Path) -> None:
    out = tmp_path / "short.session"
    made = run("session", "pirate", "--base", "smollm2", "-o", str(out), "--compact", "40")
    assert made.exit_code == 0, made.stderr
    assert json.loads((tmp_path / "short.session.json").read_text())["cells"] == 40
    state = parse(out.read_bytes(), layout(smollm2.header, "f16"), out, 40)
    template = ChatTemplate(smollm2.header)
    teacher = encode(llm, template, bundled()["pirate"].body, MESSAGES)
    student = encode(llm, template, None, MESSAGES)
    with ParallelContext(llm, teacher.prefix, 4, 100) as context:
        replies, logits = context.greedy(teacher.rest, 24, stop_tokens(llm))
    target = [log_softmax(x) for x in logits]

    def divergence(rest: list[list[int]], context: ParallelContext) -> float:
        read = context.read(
            [p + r[:-1] for p, r in zip(rest, replies, strict=True)], [len(p) - 1 for p in rest]
        )
        return float(
            np.mean([kl(t, log_softmax(x)).mean() for t, x in zip(target, read, strict=True)])
        )

    with ParallelContext(llm, student.prefix, 4, 100) as context:
        bare = divergence(student.rest, context)
    with ParallelContext(llm, teacher.prefix, 4, 100, state=state) as context:
        short = divergence(teacher.rest, context)
    assert short < 0.3 * bare
    ask = ("chat", "--base", "smollm2", "--max-tokens", "24", "--message", "Who are you?")
    said = run(*ask, "--session", str(out))
    assert said.exit_code == 0
    assert "Note" not in said.stderr
    assert any(mark in said.stdout.lower() for mark in ("arr", "matey", "ahoy", "aye", "captain"))


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path, pirate: Path) -> None:
    make = ("session", "pirate", "--base", "smollm2", "-o", str(tmp_path / "x.session"))
    assert "cells for manifesto 'pirate' of" in refused(*make, "--compact", "2")
    assert "cells for manifesto 'pirate' of" in refused(*make, "--compact", "100000")
    assert "cannot be combined with --with" in refused(
        *make, "--compact", "40", "--with", str(pirate)
    )
    assert list(tmp_path.iterdir()) == []

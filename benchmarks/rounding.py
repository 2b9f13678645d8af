"""What llama.cpp's rounding takes from the measure: the same replies read by it and in float32.

llama.cpp rounds activations to 8 bits before it multiplies them with a quantized matrix, so a
teacher and an adapter that say the same are some thousandths of a nat apart there. Prints
Markdown: for each persona KL(T‖S) as llama.cpp has it and as float32 has it, what rounding does to
T and to S each, and what an exact copy of T with rounding of its own would recover. `--adapters` is
a folder with NAME-EFFORT.gguf files, as benchmarks/ways.py leaves it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters.adapter_changes import changes_of
from superego.converters.streams import Changes, Conversation, Pack, predictions
from superego.converters.transformer import Base
from superego.dialogue import Encoded, encode
from superego.evaluate import bundled as lines
from superego.evaluate import kl, log_softmax
from superego.logits import ParallelContext
from superego.persona import Persona, read_persona
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

_GROUP, _TOKENS = 8, 48  # prompts read at once; tokens of a reply
Said = list[np.ndarray]  # log-probabilities (reply, n_vocab) of each prompt


def read(context: ParallelContext, encoded: Encoded, replies: Sequence[list[int]]) -> Said:
    """What llama.cpp says of the replies."""
    found: Said = []
    for start in range(0, len(replies), _GROUP):
        prompts = encoded.rest[start : start + _GROUP]
        part = replies[start : start + _GROUP]
        texts = [p + r[:-1] for p, r in zip(prompts, part, strict=True)]
        found += [log_softmax(x) for x in context.read(texts, [len(p) - 1 for p in prompts])]
    return found


def walk(
    base: Base, encoded: Encoded, replies: Sequence[list[int]], changes: Changes | None = None
) -> Said:
    """The same in float32."""
    talks = [Conversation(p, r) for p, r in zip(encoded.rest, replies, strict=True)]
    pack = Pack(talks, encoded.prefix)
    streams = predictions(base, pack, changes).split([len(c.reply) for c in pack.conversations])
    found = dict(zip(map(id, pack.conversations), streams, strict=True))
    return [log_softmax(base.logits(found[id(c)]).numpy()) for c in talks]


def apart(first: Said, second: Said) -> float:
    """KL(first‖second), nats a token: mean of a reply, then over replies."""
    return statistics.mean(float(kl(a, b).mean()) for a, b in zip(first, second, strict=True))


def row(model: BaseModel, base: Base, name: str, persona: Persona, n: int) -> list[float]:
    """The figures of one adapter, in the order of the table's columns."""
    llm, template = load(model, n_ctx=256), ChatTemplate(model.header)
    messages = lines("heldout")[:n]
    teacher = encode(llm, template, bundled()[name].body, messages)
    student = encode(llm, template, None, messages)
    widest = max(len(r) for e in (teacher, student) for r in e.rest) + _TOKENS
    replies: list[list[int]] = []
    with ParallelContext(llm, teacher.prefix, _GROUP, widest) as context:
        for start in range(0, n, _GROUP):
            part = teacher.rest[start : start + _GROUP]
            replies += context.greedy(part, _TOKENS, stop_tokens(llm))[0]
        target = read(context, teacher, replies)
    with ParallelContext(llm, student.prefix, _GROUP, widest, [(persona, 0.0)]) as context:
        bare = read(context, student, replies)
        context.set_scales([1.0])
        own = read(context, student, replies)
    exact, exact_bare = walk(base, teacher, replies), walk(base, student, replies)
    changes, _ = changes_of(read_adapter(persona.path))
    exact_own = walk(base, student, replies, changes)
    there, here = apart(target, own), apart(exact, exact_own)
    kl_base, by_target, by_own = apart(target, bare), apart(target, exact), apart(own, exact_own)
    return [
        kl_base,
        by_target,
        by_own,
        there,
        here,
        1 - there / kl_base,
        1 - here / apart(exact, exact_bare),
        1 - (by_target + by_own) / kl_base,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, default=Path("bench"))
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--base", default="smollm2")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = open_base(options.base)
    base = Base(model.header, torch.float32, resident=True)
    print(
        "| persona | KL(T‖0) | T: llama.cpp‖float32 | S: llama.cpp‖float32 | KL(T‖S), llama.cpp "
        "| KL(T‖S), float32 | recovered, llama.cpp | recovered, float32 | an exact copy |"
    )
    print("|---" * 9 + "|")
    rows = []
    for name in bundled():
        path = options.adapters / f"{name}-{options.effort}.gguf"
        if path.exists():
            rows.append(row(model, base, name, read_persona(path), options.prompts))
            print_row(name, rows[-1])
    if rows:
        print_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)])


def print_row(name: str, figures: Sequence[float]) -> None:
    cells = [f"{x:.4f}" for x in figures[:5]] + [f"{x:.3f}" for x in figures[5:]]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

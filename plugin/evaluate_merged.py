"""How much of a manifesto's effect merged models keep, measured in llama.cpp.

Knows that S is another model file here. T is the base with the manifesto as system
message, 0 the bare base; the measures are those of `superego.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from superego.adapter import Adapter
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import Interval, bundled, kl, log_softmax, recovered
from superego.logits import ParallelContext
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

_GROUP = 8  # prompts read at once; their full logits lie in memory together


@dataclass(frozen=True)
class MergedReport:
    """The measures of one merged model, or of the adapter beside it. KL in nats a token."""

    name: str
    kl_recovered: Interval  # 1 - KL(T‖S) / KL(T‖0)
    kl_base: float  # KL(T‖0)
    kl_merged: float  # KL(T‖S)
    top1_base: float
    top1_merged: float
    bytes: int
    prompts: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate_merged(
    base: BaseModel,
    manifesto: str,
    students: Sequence[BaseModel | tuple[Adapter, float]],
    prompts: Sequence[str] | None = None,
    max_tokens: int = 48,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MergedReport]:
    """Measure merged models (and adapters on the base) beside the system message.

    `prompts` default to the bundled held-out ones. All models are loaded at once: memory is
    that of the base and of every merged model. Raises SuperegoError for models that do not
    share the base's vocabulary.
    """
    messages = list(prompts) if prompts is not None else bundled("heldout")
    if not messages:
        raise SuperegoError("no prompts to evaluate on")
    models = [s for s in students if isinstance(s, BaseModel)]
    tokens = base.header.metadata.get("tokenizer.ggml.tokens")
    for model in models:
        if model.header.metadata.get("tokenizer.ggml.tokens") != tokens:
            raise SuperegoError(f"{model.path}: has another vocabulary than {base.path}")
    template = ChatTemplate(base.header)
    llm = load(base, n_ctx=256, threads=threads)
    teacher = encode(llm, template, manifesto, messages)
    student = encode(llm, template, None, messages)
    widest = max(len(r) for e in (teacher, student) for r in e.rest) + max_tokens
    stop = stop_tokens(llm)
    n = len(messages)
    names, sizes, divergence, agreement = ["base"], [0], [np.zeros(n)], [np.zeros(n)]
    counts = np.zeros(n)
    with ExitStack() as stack:
        speaker = stack.enter_context(ParallelContext(llm, teacher.prefix, _GROUP, widest))
        contexts = [stack.enter_context(ParallelContext(llm, student.prefix, _GROUP, widest))]
        for each in students:
            own, adapters = llm, []
            if isinstance(each, BaseModel):
                own = load(each, n_ctx=256, threads=threads)
                stack.callback(own.close)
                names.append(str(each.path))
                sizes.append(each.header.size)
            else:
                adapters = [each]
                names.append(f"{each[0].path}:{each[1]:g}")
                sizes.append(each[0].header.size)
            contexts.append(
                stack.enter_context(ParallelContext(own, student.prefix, _GROUP, widest, adapters))
            )
            divergence.append(np.zeros(n))
            agreement.append(np.zeros(n))
        for start in range(0, n, _GROUP):
            part = slice(start, start + _GROUP)
            replies, logits = speaker.greedy(teacher.rest[part], max_tokens, stop)
            target = [log_softmax(rows) for rows in logits]
            texts = [p + r[:-1] for p, r in zip(student.rest[part], replies, strict=True)]
            first = [len(p) - 1 for p in student.rest[part]]
            counts[part] = [len(rows) for rows in target]
            for context, kls, agree in zip(contexts, divergence, agreement, strict=True):
                read = context.read(texts, first)
                for i, (mine, want) in enumerate(zip(read, target, strict=True), start):
                    agree[i] = (mine.argmax(-1) == want.argmax(-1)).mean()
                    kls[i] = kl(want, log_softmax(mine)).mean()
            progress(min(start + _GROUP, n), n)
    return [
        MergedReport(
            name=names[i],
            kl_recovered=recovered(divergence[0], divergence[i]),
            kl_base=float(divergence[0].mean()),
            kl_merged=float(divergence[i].mean()),
            top1_base=float(agreement[0].mean()),
            top1_merged=float(agreement[i].mean()),
            bytes=sizes[i],
            prompts=n,
            tokens=int(counts.sum()),
        )
        for i in range(1, len(names))
    ]

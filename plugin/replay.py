"""How near a model's variants are to each other on given replies, in llama.cpp.

Knows KL over replies that are there already. Does not know what is compared or why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from superego.evaluate import kl, log_softmax
from superego.exchanges import Exchange
from superego.logits import ParallelContext
from superego.persona import Persona

if TYPE_CHECKING:
    from llama_cpp import Llama

GROUP = 8  # conversations read at once; their full logits lie in memory together
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """One way to run a base: its prefix tokens, and the adapters' scales."""

    prefix: list[int]
    scales: tuple[float, ...] = ()


def replies(
    llm: Llama,
    variant: Variant,
    adapters: Sequence[Persona],
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop: set[int],
) -> list[list[int]]:
    """The variant's greedy replies to prompts, given as tokens behind its prefix."""
    room = max(map(len, prompts)) + max_tokens
    found: list[list[int]] = []
    with _context(llm, variant, adapters, room) as context:
        for start in range(0, len(prompts), GROUP):
            found += context.greedy(prompts[start : start + GROUP], max_tokens, stop)[0]
    return found


def divergences(
    llm: Llama,
    target: Variant,
    others: Sequence[Variant],
    adapters: Sequence[Persona],
    exchanges: Sequence[Exchange],
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """KL(target‖other) in nats a reply token, mean over each reply: (len(others), n)."""
    room = max(len(p) + len(r) for p, r in exchanges)
    found = np.zeros((len(others), len(exchanges)))
    total = len(exchanges) * (1 + len(others))
    done = 0
    prefixes = {tuple(v.prefix) for v in (target, *others)}
    contexts: dict[tuple[int, ...], ParallelContext] = {}
    try:
        for prefix in prefixes:
            contexts[prefix] = _context(llm, Variant(list(prefix)), adapters, room)
        for start in range(0, len(exchanges), GROUP):
            part = exchanges[start : start + GROUP]
            texts = [p + r[:-1] for p, r in part]  # the last token is only ever predicted
            first = [len(p) - 1 for p, _ in part]

            def read(
                variant: Variant,
                texts: list[list[int]] = texts,
                first: list[int] = first,
            ) -> list[np.ndarray]:
                context = contexts[tuple(variant.prefix)]
                context.set_scales(variant.scales or [0.0] * len(adapters))
                return [log_softmax(x) for x in context.read(texts, first)]

            want = read(target)
            done += len(part)
            progress(done, total)
            for row, other in enumerate(others):
                for i, (p, q) in enumerate(zip(want, read(other), strict=True)):
                    found[row, start + i] = kl(p, q).mean()
                done += len(part)
                progress(done, total)
    finally:
        for context in contexts.values():
            context.close()
    return found


def _context(
    llm: Llama, variant: Variant, adapters: Sequence[Persona], room: int
) -> ParallelContext:
    scales = variant.scales or (0.0,) * len(adapters)
    return ParallelContext(
        llm, variant.prefix, GROUP, room, list(zip(adapters, scales, strict=True))
    )

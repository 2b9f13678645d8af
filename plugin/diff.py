"""What differs between two adapters: their manifestos, and what they make a model say.

Knows texts, KL and replies. Does not know how the adapters were made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from superego.adapter import Adapter
from superego.base import BaseModel
from superego.dialogue import encode
from superego.exchanges import unused_prompts
from superego.history import manifesto_of
from superego.replay import Variant, divergences, replies
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

_PROMPTS, _TOKENS = 24, 48
Progress = Callable[[str, int, int], None]


def manifesto_diff(a: Adapter, b: Adapter) -> list[str]:
    """Unified diff lines of the manifestos of A and B; none where they are the same."""
    old, new = (manifesto_of(each).body.splitlines() for each in (a, b))
    return list(difflib.unified_diff(old, new, str(a.path), str(b.path), lineterm=""))


def behaviour_diff(
    a: tuple[Adapter, float],
    b: tuple[Adapter, float],
    model: BaseModel,
    prompts: list[str] | None = None,
    show: int = 3,
    threads: int | None = None,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """KL(A‖B) on A's own greedy replies, a prompt at a time, and both replies of the `show`
    prompts that changed most. nats a token, full vocabulary.

    `prompts` default to messages that neither adapter was fitted on. KL(A‖bare base) on the
    same replies stands beside it as the measure of what is much.
    """
    llm = load(model, n_ctx=256, threads=threads)
    adapters = [a[0], b[0]]
    messages = prompts or unused_prompts(llm, model.header, adapters, _PROMPTS)
    encoded = encode(llm, ChatTemplate(model.header), None, messages)
    with_a = Variant(encoded.prefix, (a[1], 0.0))
    with_b = Variant(encoded.prefix, (0.0, b[1]))
    stop = stop_tokens(llm)
    progress("replies", 0, 1)
    said = replies(llm, with_a, adapters, encoded.rest, _TOKENS, stop)
    progress("replies", 1, 1)
    kls = divergences(
        llm,
        with_a,
        [with_b, Variant(encoded.prefix, (0.0, 0.0))],
        adapters,
        list(zip(encoded.rest, said, strict=True)),
        lambda done, total: progress("comparing", done, total),
    )
    order = sorted(range(len(messages)), key=lambda i: -kls[0, i])
    top = order[:show]
    # both in batches of the same messages: rounding depends on what is read together
    shown = [encoded.rest[i] for i in top]
    both = [replies(llm, each, adapters, shown, _TOKENS, stop) for each in (with_a, with_b)]

    def text(tokens: list[int]) -> str:
        return llm.detokenize([t for t in tokens if t not in stop]).decode("utf-8", "replace")

    return {
        "prompts": len(messages),
        "KL between A and B": round(float(kls[0].mean()), 5),
        "KL between A and the bare base": round(float(kls[1].mean()), 5),
        "by prompt": [{"prompt": messages[i], "KL": round(float(kls[0, i]), 5)} for i in order],
        "changed most": [
            {
                "prompt": messages[i],
                "KL": round(float(kls[0, i]), 5),
                "A": text(one),
                "B": text(other),
            }
            for i, one, other in zip(top, *both, strict=True)
        ],
    }

"""Recitals: the teacher made to begin with words of its own manifesto, and left to go on.

Knows sentences. Does not know what is solved. A model with a system message now and then says that
message, word for word: in one or two replies of a hundred, so references hold few of them or none,
but where it happens the bare base is ten times as far from the teacher as elsewhere. docs/tries.md
has what such conversations bring and cost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from superego.converters.decode import ROOM
from superego.converters.references import LONG_REPLY, Prompts, Teacher
from superego.converters.streams import Conversation
from superego.converters.transformer import Base

if TYPE_CHECKING:
    from llama_cpp import Llama

WEIGHT = 0.25  # of a recital, as a share of a reference's; its root is exact in bfloat16
_OPENING = 5  # tokens that the teacher is made to begin with
_LEAST = 8  # tokens from there to the manifesto's end, at least


def openings(llm: Llama, body: str) -> list[list[int]]:
    """The first tokens of each sentence and line of a manifesto, in its order, none twice."""
    found: dict[tuple[int, ...], None] = {}
    for start in re.finditer(r"(?:^|(?<=[.!?:;])\s+|(?<=[。！？：；])|\n)\s*(?=\S)", body):
        tokens = llm.tokenize(body[start.end() :][:400].encode(), add_bos=False, special=False)
        if len(tokens) >= _LEAST:
            found[tuple(tokens[:_OPENING])] = None
    return [list(each) for each in found]


def write_recitals(
    llm: Llama,
    base: Base,
    fingerprint: str,
    prompts: Prompts,
    body: str,
    n: int,
    seed: int,
    use_cache: bool,
    progress: Callable[[int, int], None],
    room: int = ROOM,
) -> list[Conversation]:
    """n conversations (fewer where there are fewer prompts) that begin with the manifesto's words.

    The prompts are drawn from those given, the sentences taken in turn, so that each is met behind
    several prompts. Empty where the manifesto has no sentence long enough.
    """
    begun = openings(llm, body)
    if not begun:
        return []
    rest = random.Random(seed).sample(prompts.rest, min(n, len(prompts.rest)))
    fronts = [begun[i % len(begun)] for i in range(len(rest))]
    teacher = Teacher(llm, base, fingerprint, prompts.prefixes, use_cache, room)
    block = [prompt + front for prompt, front in zip(rest, fronts, strict=True)]
    limits = [LONG_REPLY - len(front) for front in fronts]
    replies, _ = teacher.replies(block, limits, lambda done: progress(done, sum(limits)))
    return [
        Conversation(prompt, front + reply, WEIGHT)
        for prompt, front, reply in zip(rest, fronts, replies, strict=True)
    ]

"""One-turn conversations as tokens: a shared prefix and what follows it.

Knows templates and tokenizers. Does not run a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superego.prompt import encode_messages
from superego.template import ChatTemplate, conversation

if TYPE_CHECKING:
    from llama_cpp import Llama

# Two messages that share no first token: what they have in common is the prefix alone.
_PROBES = ("Hello", "7")


@dataclass(frozen=True)
class Encoded:
    """User messages rendered behind one system message (or none)."""

    prefix: list[int]  # the tokens that all of them start with
    rest: list[list[int]]  # the message's own tokens up to where the reply begins


def encode(
    llm: Llama, template: ChatTemplate, system: str | None, messages: Sequence[str]
) -> Encoded:
    """Render and tokenize whole prompts, then split off their common prefix.

    Tokenizing the whole text keeps merges across the border as the runtime makes them.
    """
    tokens = [
        encode_messages(llm, template, conversation(system, m)) for m in (*_PROBES, *messages)
    ]
    shared = 0
    for column in zip(*tokens, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return Encoded(tokens[0][:shared], [t[shared:] for t in tokens[len(_PROBES) :]])

"""Activated LoRA: an adapter that acts only from the reply's header on.

Knows the template's reply header and llama.cpp's key for it. Does not know how adapters are
made. llama-server keeps the base's cached keys and values before the header, since they are
the base's own; every other runtime ignores the key and applies a plain LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from superego.adapter import Adapter
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.pairs import write_copy
from superego.roster import ALORA_KEY
from superego.runtime import tokenize
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama


def invocation_tokens(llm: Llama, template: ChatTemplate) -> list[int]:
    """The tokens of what the template puts before a reply; raises SuperegoError for none."""
    message = [{"role": "user", "content": "Hello"}]
    whole, asked = template.render(message), template.render(message, reply=False)
    header = whole.removeprefix(asked)
    tokens = tokenize(llm, header) if whole.startswith(asked) else []
    if not tokens:
        raise SuperegoError(
            "the chat template puts nothing before a reply, so an activated LoRA would never "
            "begin to act; use the plain adapter"
        )
    for rest in encode(llm, template, None, ["Hello", "What is 2 + 2?", "One.\n\n"]).rest:
        if rest[-len(tokens) :] != tokens:
            raise SuperegoError(
                f"the reply's header {header!r} merges with what is before it into other tokens; "
                "an activated LoRA would not begin to act; use the plain adapter"
            )
    return tokens


def write_activated(adapter: Adapter, invocation: list[int], path: Path) -> None:
    """Copy an adapter, adding the invocation tokens; atomically; raises SuperegoError."""
    # llama.cpp takes unsigned 32-bit numbers here, and nothing else
    write_copy(adapter, path, {ALORA_KEY: invocation})

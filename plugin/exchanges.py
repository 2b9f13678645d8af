"""The reference conversations that an adapter file keeps, and prompts that are not among them.

Knows their form in the metadata. Does not know how they were written. They are what an
amended manifesto's compile starts from, on any machine, and what a moved adapter is
measured on.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from superego.adapter import Adapter
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.gguf_file import Header
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

_AT_ONCE = 256  # messages rendered together
Exchange = tuple[list[int], list[int]]  # prompt and reply, tokens behind the prefix


def vocabulary(header: Header) -> str:
    """A hash of a base's tokens: references mean nothing under other tokens."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def pack_references(base: Header, exchanges: Sequence[Exchange]) -> str:
    """The text that goes under `superego.references`."""
    found = {"vocabulary": vocabulary(base), "exchanges": [list(e) for e in exchanges]}
    return json.dumps(found, separators=(",", ":"))


def kept_references(adapter: Adapter, base: Header) -> list[Exchange]:
    """What the adapter keeps, in order; nothing where it keeps none for this vocabulary.

    Raises SuperegoError where what it keeps is damaged.
    """
    text = adapter.own.get("references")
    if text is None:
        return []
    try:
        found = json.loads(text)
        if found["vocabulary"] != vocabulary(base):
            return []
        n_vocab = len(base.metadata.get("tokenizer.ggml.tokens", []))
        exchanges = [(list(prompt), list(reply)) for prompt, reply in found["exchanges"]]
        whole = all(
            side and all(type(t) is int and 0 <= t < n_vocab for t in side)
            for exchange in exchanges
            for side in exchange
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise SuperegoError(
            f"{adapter.path}: superego.references is damaged; compile the manifesto anew "
            "('superego inspect' shows it)"
        )
    return exchanges


def unused_prompts(llm: Llama, base: Header, adapters: Sequence[Adapter], n: int) -> list[str]:
    """At most n seed messages that none of these adapters was fitted on.

    Neither references nor held-out prompts: what is tuned or looked at again and again is
    measured on these. Raises SuperegoError where fewer than eight are left.
    """
    text = importlib.resources.files("superego.converters").joinpath("seeds.txt")
    lines = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
    found = lines[::-1]  # an adapter that does not keep its references began at the front
    used = {tuple(p) for a in adapters for p, _ in kept_references(a, base)}
    template = ChatTemplate(base)
    unused: list[str] = []
    for start in range(0, len(found), _AT_ONCE):  # there are thousands, of which few are wanted
        some = found[start : start + _AT_ONCE]
        rest = encode(llm, template, None, some).rest
        unused += [m for m, tokens in zip(some, rest, strict=True) if tuple(tokens) not in used]
        if len(unused) >= n:
            break
    if len(unused) < min(n, 8):
        raise SuperegoError(f"only {len(unused)} messages are left that no adapter was fitted on")
    return unused[:n]

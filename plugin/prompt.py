"""Conversations as the tokens that a model reads; what people typed is always plain text.

Knows chat templates, tokenizers and their control tokens. Does not run a model.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from superego.runtime import tokenize
from superego.template import ChatTemplate, Message

if TYPE_CHECKING:
    from llama_cpp import Llama

# By model and template: reading a vocabulary takes 15 ms and more.
_known: weakref.WeakKeyDictionary[Any, dict[str, dict[str, bool]]] = weakref.WeakKeyDictionary()


def encode_messages(llm: Llama, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """The tokens of a rendered conversation, up to where the reply begins.

    The template's control tokens are parsed. Those that a message's text spells are not: no text
    can end its turn or begin another's. A conversation without any is tokenized as a whole, as
    llama.cpp does; else in pieces, cut within each spelled token. Of replies only what is a
    control token outright is cut: what else a model writes, such as its thoughts' marks, the
    template may look for.
    """
    tokens = control_tokens(llm, template.source)
    held = _pattern(tokens)
    outright = _pattern([text for text, control in tokens.items() if control])
    texts = "".join(message["content"] for message in messages)
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in texts + template.source)
    marked = [
        {
            **message,
            "content": (outright if message["role"] == "assistant" else held).sub(
                rf"\g<0>{mark}", message["content"]
            ),
        }
        for message in messages
    ]
    first, *rest = template.render(marked).split(mark)
    return tokenize(llm, first) + [token for piece in rest for token in _behind(llm, piece)]


def control_tokens(llm: Llama, template: str) -> dict[str, bool]:
    """The text of every token that ends a turn, begins one, or is otherwise no text.

    The value says whether the vocabulary calls it that. Some models mark those of their chat
    template (its source) as user-defined, as they do runs of spaces and HTML tags: of these only
    the ones that the template writes count.
    """
    import llama_cpp as c

    known = _known.setdefault(llm._model, {})
    if template in known:
        return known[template]
    vocab = llm._model.vocab
    found: dict[str, bool] = {}
    outright = c.LLAMA_TOKEN_ATTR_CONTROL | c.LLAMA_TOKEN_ATTR_UNKNOWN
    for token in range(llm.n_vocab()):
        kind = c.llama_vocab_get_attr(vocab, token)
        if not kind & (outright | c.LLAMA_TOKEN_ATTR_USER_DEFINED):
            continue
        text = c.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
        if kind & outright:
            found[text] = True
        elif len(text.strip()) > 2 and text in template:
            found[text] = False
    known[template] = found
    return found


def spelled(llm: Llama, template: ChatTemplate, text: str) -> int:
    """How many control tokens a text spells."""
    return len(_pattern(control_tokens(llm, template.source)).findall(text))


def _pattern(tokens: Sequence[str] | dict[str, bool]) -> re.Pattern[str]:
    """The first character of each spelled token, of those too that overlap another."""
    found = [re.escape(token) for token in tokens if len(token) > 1]
    return re.compile(f"(?=(?:{'|'.join(found)})).", re.DOTALL) if found else re.compile("(?!)")


def _behind(llm: Llama, text: str) -> list[int]:
    """The tokens of text that goes on: SentencePiece would put a space in front."""
    front, whole = tokenize(llm, "\n"), tokenize(llm, f"\n{text}")
    return whole[len(front) :] if whole[: len(front)] == front else tokenize(llm, text)

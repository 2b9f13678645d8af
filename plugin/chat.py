"""Chat with a base and its personas: streaming replies in llama.cpp.

Knows messages, sampling and streaming. Does not know how the personas were made.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from superego.errors import SuperegoError
from superego.prompt import encode_messages, spelled
from superego.provenance import Document, in_front
from superego.runtime import stop_tokens, tokenize
from superego.session import Session, prefill, prefix_of
from superego.template import ChatTemplate, Message

if TYPE_CHECKING:
    from llama_cpp import Llama


class Chat:
    """A conversation with a live model; what was said stays until `clear`."""

    def __init__(
        self,
        llm: Llama,
        template: ChatTemplate,
        system: str | None = None,
        session: Session | None = None,
        documents: Sequence[Document] = (),
    ) -> None:
        """`session` is one that is in the model's cache; its manifesto is the system message.

        `documents` stand in front of the first question, again after `clear`; control
        tokens in them are read as plain text, `self.defused` counts them.
        """
        self._session = session
        if session is not None:
            system = session.manifesto
        self._llm = llm
        self._template = template
        self._stop = stop_tokens(llm)
        self._prefix: list[int] = []
        if session is not None:
            self._prefix = session.prefix
        elif system:
            self._prefix = prefix_of(llm, template, system)
        self._front: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self._documents = list(documents)
        self.defused = sum(spelled(llm, template, document.text) for document in documents)

    def clear(self) -> None:
        """Forget the conversation, keep the system message."""
        self.messages.clear()

    def _warm(self, front: list[int]) -> None:
        """Have the system message in the cache, read by itself.

        Rounding depends on what is read together: so a restored session and a system message
        give the same reply, whatever the message is.
        """
        if not front or self._llm._input_ids[: len(front)].tolist() == front:
            return
        if len(front) < len(self._prefix):
            # what was compacted cannot be read again: its tokens are not its text
            raise SuperegoError("the session has left the model's cache; open it again")
        if len(front) < self._llm.n_ctx():
            prefill(self._llm, front)

    def reply(self, message: str, max_tokens: int = 256, temperature: float = 0.0) -> Iterator[str]:
        """Stream the reply to a message; both join the conversation when it ends.

        Raises SuperegoError where the conversation no longer fits the context.
        """
        content = message
        if self._documents and not self.messages:
            content = in_front(self._documents, message)
        turn: Message = {"role": "user", "content": content}
        said_so_far = [*self._front, *self.messages, turn]
        tokens = encode_messages(self._llm, self._template, said_so_far)
        front = self._prefix
        if self._session is not None:
            tokens, front = self._session.shorten(tokens), self._session.tokens
        room = self._llm.n_ctx() - len(tokens)
        if room < 1 and content is not message:
            length = len(tokenize(self._llm, content))
            raise SuperegoError(
                f"{len(self._documents)} documents and the question have {length:,} tokens, the "
                f"whole prompt {len(tokens):,}; the context has {self._llm.n_ctx():,}; give fewer "
                "or shorter documents, or a larger --n-ctx"
            )
        self._warm(front)
        if room < 1:
            raise SuperegoError(
                f"conversation of {len(tokens)} tokens does not fit the context of "
                f"{self._llm.n_ctx()}; start anew or give a larger --n-ctx"
            )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        said: list[str] = []
        stream = self._llm.generate(tokens, temp=temperature, top_p=0.95, min_p=0.05)
        for token in itertools.islice(stream, min(max_tokens, room)):
            if token in self._stop:
                break
            piece = decoder.decode(self._llm.detokenize([token], special=False))
            if piece:
                said.append(piece)
                yield piece
        rest = decoder.decode(b"", final=True)
        if rest:
            said.append(rest)
            yield rest
        self.messages += [turn, {"role": "assistant", "content": "".join(said)}]

"""One base, many minds: a context per persona on one set of weights.

Knows how to give a loaded model another context. Does not know what a persona is made of:
`attach` puts it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from superego.attachment import Attachment, attach
from superego.chat import Chat
from superego.errors import SuperegoError
from superego.gguf_file import read_header
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama


def fork(llm: Llama, n_ctx: int | None = None) -> Llama:
    """Another `Llama` on the same weights, with a context of its own and an empty cache.

    Everything that `Llama` offers works on it. Its memory is that of its context alone.
    Close it before the model it came from. Raises SuperegoError where there is no memory.
    """
    from llama_cpp import _internals as internals

    if getattr(llm, "lora_path", None):
        raise SuperegoError(
            f"this model was loaded with lora_path={llm.lora_path!r}, which acts in one context "
            "alone; load it without and attach that file"
        )
    # copy.copy would load the file again: `Llama` pickles by its path
    other = object.__new__(type(llm))
    other.__dict__.update(llm.__dict__)  # weights, tokenizer and settings are shared
    other._stack = contextlib.ExitStack()  # what closing it frees: its own parts
    other.context_params = type(llm.context_params).from_buffer_copy(llm.context_params)
    if n_ctx is not None:
        other.context_params.n_ctx = -(-n_ctx // 256) * 256
    try:
        other._ctx = internals.LlamaContext(
            model=llm._model, params=other.context_params, verbose=False
        )
    except ValueError as error:
        raise SuperegoError(f"no context of {other.context_params.n_ctx} tokens: {error}") from None
    if not other._ctx.ctx:
        raise SuperegoError(f"llama.cpp could not make a context of {n_ctx} tokens")
    other._stack.enter_context(contextlib.closing(other._ctx))
    other._batch = other._stack.enter_context(
        contextlib.closing(
            internals.LlamaBatch(
                n_tokens=llm.n_batch, embd=0, n_seq_max=other.context_params.n_ctx, verbose=False
            )
        )
    )
    other._n_ctx = other.n_ctx()
    other.input_ids = np.zeros(other._n_ctx, dtype=np.intc)
    if llm._logits_all:
        other.scores = np.zeros((other._n_ctx, llm.n_vocab()), dtype=np.single)
    other.n_tokens = 0
    other._requires_eval = True
    other._sampler = None
    other._candidates = internals.LlamaTokenDataArray(n_vocab=llm.n_vocab())
    return other


class Personas(Mapping[str, "Llama"]):
    """Personas by name, each a `Llama` with its own context; the weights are shared.

    Switching is choosing another entry: nothing is read again, and each keeps its
    conversation. Use it in a `with` block or call `close`.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._template = ChatTemplate(read_header(Path(llm.model_path)))
        self._minds: dict[str, Llama] = {}
        self._attached: dict[str, Attachment | None] = {}
        self._chats: dict[str, Chat] = {}

    def add(
        self,
        name: str,
        persona: str | Path | None = None,
        scale: float = 1.0,
        system: str | None = None,
        n_ctx: int = 2048,
    ) -> Llama:
        """A new mind: an adapter, session or folder, a system message, both or neither.

        Raises SuperegoError where the name is taken or the persona does not fit.
        """
        if name in self._minds:
            raise SuperegoError(f"there is a persona '{name}' already; remove it first")
        mind = fork(self._llm, n_ctx)
        try:
            attachment = attach(mind, persona, scale) if persona is not None else None
        except SuperegoError:
            mind.close()
            raise
        session = attachment.session if attachment else None
        self._minds[name] = mind
        self._attached[name] = attachment
        self._chats[name] = Chat(mind, self._template, system, session)
        return mind

    def chat(self, name: str) -> Chat:
        """The conversation with one of them; it goes on where it was left."""
        self[name]
        return self._chats[name]

    def context_bytes(self, name: str) -> int:
        """Memory of the cells that a mind has filled so far, as llama.cpp would save them."""
        import llama_cpp

        return int(llama_cpp.llama_state_seq_get_size(self[name]._ctx.ctx, 0))

    def remove(self, name: str) -> None:
        """Forget one of them and free its context."""
        mind = self[name]
        attachment = self._attached.pop(name)
        if attachment is not None:
            attachment.detach()
        del self._minds[name], self._chats[name]
        mind.close()

    def close(self) -> None:
        """Free every context; the base model stays."""
        for name in list(self._minds):
            self.remove(name)

    def __getitem__(self, name: str) -> Llama:
        if name not in self._minds:
            known = ", ".join(self._minds) or "none yet"
            raise SuperegoError(f"no persona '{name}'; there are: {known}")
        return self._minds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._minds

    def __iter__(self) -> Iterator[str]:
        return iter(self._minds)

    def __len__(self) -> int:
        return len(self._minds)

    def __enter__(self) -> Personas:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

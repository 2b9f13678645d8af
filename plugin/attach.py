"""Attach adapters to a live `llama_cpp.Llama`, change their scale, take them off again.

Knows llama.cpp's adapter calls and that any change makes the cached keys and values
stale. Does not know how adapters are made.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from superego.adapter import Adapter, check_fit, read_adapter
from superego.errors import SuperegoError
from superego.gguf_file import Header, read_header

if TYPE_CHECKING:
    from llama_cpp import Llama


class Attachment:
    """One adapter on one model. Detaches at the end of a `with` block."""

    def __init__(self, model: _Model, adapter: Adapter, pointer: Any, scale: float) -> None:
        self._model = model
        self._pointer = pointer
        self.adapter = adapter
        self.scale = scale

    @property
    def attached(self) -> bool:
        """Whether it is still on its model."""
        return self in self._model.attachments

    def set_scale(self, scale: float) -> None:
        """Change the strength; drops the model's cached keys and values."""
        if not self.attached:
            raise SuperegoError(f"{self.adapter.path}: is not attached any more")
        self.scale = _finite(scale)
        self._model.apply()

    def detach(self) -> None:
        """Take it off; without effect where it is off already."""
        if self.attached:
            self._model.remove([self])

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


class _Model:
    """A live model's attachments, in the order they were attached."""

    def __init__(self, llm: Llama) -> None:
        self._llm = weakref.ref(llm)
        self.attachments: list[Attachment] = []
        self.header: Header = read_header(Path(llm.model_path))

    def llm(self) -> Llama:
        llm = self._llm()
        if llm is None:
            raise SuperegoError("the model that this adapter was attached to is gone")
        return llm

    def add(self, adapter: Adapter, scale: float) -> Attachment:
        import llama_cpp

        llm = self.llm()
        pointer = llama_cpp.llama_adapter_lora_init(llm._model.model, str(adapter.path).encode())
        if not pointer:  # a null POINTER is falsy but is not None
            raise SuperegoError(f"{adapter.path}: llama.cpp could not load the adapter")
        attachment = Attachment(self, adapter, pointer, scale)
        self.attachments.append(attachment)
        self.apply()
        return attachment

    def remove(self, gone: list[Attachment]) -> None:
        import llama_cpp

        self.attachments = [a for a in self.attachments if a not in gone]
        self.apply()
        for attachment in gone:
            llama_cpp.llama_adapter_lora_free(attachment._pointer)
            attachment._pointer = None

    def apply(self) -> None:
        """Hand the attachments to llama.cpp and forget what was computed without them."""
        import llama_cpp

        llm = self.llm()
        active = [a for a in self.attachments if a.scale != 0.0]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(1, len(active)))(
            *(a._pointer for a in active)
        )
        scales = (ctypes.c_float * max(1, len(active)))(*(a.scale for a in active))
        if llama_cpp.llama_set_adapters_lora(llm._ctx.ctx, pointers, len(active), scales):
            raise SuperegoError("llama.cpp refused the adapters")
        llm.reset()
        llm._ctx.kv_cache_clear()


_models: weakref.WeakKeyDictionary[Llama, _Model] = weakref.WeakKeyDictionary()


def attach(llm: Llama, adapter: str | Path, scale: float = 1.0) -> Attachment:
    """Put an adapter on a live model, beside those already there.

    Checks the file against the model's own GGUF first and raises SuperegoError with every
    mismatch: llama.cpp ends the process on some of them. Clears the model's cached keys
    and values. Use the result in a `with` block, or call its `detach`.
    """
    if getattr(llm, "cache", None) is not None:
        raise SuperegoError(
            "this model has a prompt cache, which llama-cpp-python keys on tokens alone: it "
            "would replay another persona's state; call llm.set_cache(None) first"
        )
    if getattr(llm, "lora_path", None):
        raise SuperegoError(
            f"this model was loaded with lora_path={llm.lora_path!r}; load it without and "
            "attach that file too"
        )
    model = _models.get(llm)
    if model is None:
        model = _models[llm] = _Model(llm)
    checked = read_adapter(Path(adapter))
    check_fit(checked, model.header)
    return model.add(checked, _finite(scale))


def attachments(llm: Llama) -> list[Attachment]:
    """What is attached to a model, in order."""
    model = _models.get(llm)
    return list(model.attachments) if model else []


def detach(llm: Llama) -> None:
    """Take every adapter off: the model is the bare base again, bit for bit."""
    model = _models.get(llm)
    if model is not None and model.attachments:
        model.remove(list(model.attachments))


def set_scale(llm: Llama, scale: float) -> None:
    """Change the strength of the one attached adapter; with several, use each Attachment's."""
    found = attachments(llm)
    if len(found) != 1:
        raise SuperegoError(
            f"set_scale(llm, …) needs exactly one attached adapter, found {len(found)}; "
            "call set_scale on the Attachment that attach returned"
        )
    found[0].set_scale(scale)


def _finite(scale: float) -> float:
    value = float(scale)
    if not -100.0 <= value <= 100.0:  # also refuses NaN
        raise SuperegoError(f"scale {scale!r}: expected a number between -100 and 100")
    return value

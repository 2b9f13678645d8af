"""Adapters in llama.cpp's memory, and what is handed to a context for the scales they act at.

Knows llama.cpp's adapter handles, and that a slot acts as a whole. Does not know whose
context it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superego.adapter import Adapter
from superego.atomic import temporary_folder
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.pairs import has_slot, slot_scales, write_slot


class Loaded:
    """One checked adapter, loaded for one model; `free` it before the model goes."""

    def __init__(self, model: Any, adapter: Adapter) -> None:
        """`model` is llama.cpp's; raises SuperegoError where it does not take the file."""
        self._model = model
        self._adapter = adapter
        self._slot: Any = None
        self.slotted = has_slot(adapter)
        check_unchanged(adapter.header)  # what was checked is what is loaded
        self.whole = _init(model, adapter.path)
        try:
            check_unchanged(adapter.header)
        except SuperegoError:
            self.free()
            raise

    def slot(self) -> Any:
        """The handle of the slot alone, loaded when first needed."""
        if self._slot is None:
            with temporary_folder() as folder:
                path = folder / "slot.gguf"
                write_slot(self._adapter, path)
                self._slot = _init(self._model, path)
        return self._slot

    def free(self) -> None:
        """Give the memory back; without effect the second time."""
        import llama_cpp

        for handle in (self.whole, self._slot):
            if handle:
                llama_cpp.llama_adapter_lora_free(handle)
        self.whole = self._slot = None


def hand_over(context: Any, loaded: Sequence[Loaded], scales: Sequence[float]) -> None:
    """Let adapters act in a context at these scales, and no others; the cache is not touched."""
    import llama_cpp

    added = slot_scales(scales, [each.slotted for each in loaded])
    active = [(each.whole, s) for each, s in zip(loaded, scales, strict=True) if s]
    active += [(each.slot(), s) for each, s in zip(loaded, added, strict=True) if abs(s) > 1e-6]
    n = max(1, len(active))
    handles = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*(handle for handle, _ in active))
    values = (ctypes.c_float * n)(*(scale for _, scale in active))
    if llama_cpp.llama_set_adapters_lora(context, handles, len(active), values):
        raise SuperegoError("llama.cpp refused the adapters")


def _init(model: Any, path: Path) -> Any:
    import llama_cpp

    handle = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
    if not handle:  # a null POINTER is falsy but is not None
        raise SuperegoError(f"{path}: llama.cpp could not load the adapter")
    return handle

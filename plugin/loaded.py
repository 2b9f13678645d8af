"""Adapters and control vectors in llama.cpp's memory, and what is handed to a context for scales.

Knows llama.cpp's adapter handles, that a slot acts as a whole, and that a context has one control
vector. Does not know whose context it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from superego.adapter import Adapter
from superego.atomic import temporary_folder
from superego.control_vector import ControlVector
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.pairs import check_marks, net_scales, slot_marks, slot_scales, write_slot
from superego.persona import Persona

_steered: set[int] = set()  # addresses of contexts that have been given a control vector


class Loaded:
    """One checked adapter, loaded for one model; `free` it before the model goes."""

    def __init__(self, model: Any, adapter: Adapter) -> None:
        """`model` is llama.cpp's; raises SuperegoError where it does not take the file."""
        self._model = model
        self._adapter = adapter
        self._slot: Any = None
        self.file = adapter.path.resolve(), adapter.header.modified
        self.marks = slot_marks(adapter)
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


class LoadedVector:
    """One checked control vector as llama.cpp takes it: every layer's, from layer 1 on."""

    def __init__(self, model: Any, vector: ControlVector) -> None:
        """`model` is llama.cpp's."""
        import llama_cpp

        self.values = np.zeros((llama_cpp.llama_model_n_layer(model) - 1, vector.width), np.float32)
        for layer, direction in vector.directions.items():
            self.values[layer - 1] = direction

    def free(self) -> None:
        """Nothing of it is in llama.cpp's memory but what a context copied."""


Acting: TypeAlias = Loaded | LoadedVector


def load_persona(model: Any, persona: Persona) -> Acting:
    """Bring what has been checked into llama.cpp's memory, for one model; raises SuperegoError."""
    return Loaded(model, persona) if isinstance(persona, Adapter) else LoadedVector(model, persona)


def hand_over(context: Any, acting: Sequence[Acting], scales: Sequence[float]) -> None:
    """Let these act in a context at these scales, and no others; the cache is not touched.

    Raises SuperegoError, and changes nothing, where their slots do not go together.
    """
    import llama_cpp

    each_scaled = list(zip(acting, scales, strict=True))
    loaded = [each for each in acting if isinstance(each, Loaded)]
    scales = [scale for each, scale in each_scaled if isinstance(each, Loaded)]
    marked = zip(loaded, scales, strict=True)
    check_marks([(str(each.file[0]), each.marks) for each, scale in marked if scale > 0])
    _steer(context, [(v.values, s) for v, s in each_scaled if isinstance(v, LoadedVector) and s])
    # one without a scale takes no part, and may be freed
    scales = net_scales([each.file for each in loaded], scales)
    added = slot_scales(scales, [each.marks is not None for each in loaded])
    active = [(each.whole, s) for each, s in zip(loaded, scales, strict=True) if abs(s) > 1e-6]
    active += [(each.slot(), s) for each, s in zip(loaded, added, strict=True) if abs(s) > 1e-6]
    n = max(1, len(active))
    handles = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*(handle for handle, _ in active))
    values = (ctypes.c_float * n)(*(scale for _, scale in active))
    if llama_cpp.llama_set_adapters_lora(context, handles, len(active), values):
        raise SuperegoError("llama.cpp refused the adapters")


def _steer(context: Any, vectors: Sequence[tuple[np.ndarray, float]]) -> None:
    """Give the context the sum of control vectors, or take off what it has."""
    import llama_cpp

    address = ctypes.cast(context, ctypes.c_void_p).value or 0
    if not vectors:
        # most contexts never have one, and any call makes llama.cpp plan its graphs anew
        if address in _steered:
            llama_cpp.llama_set_adapter_cvec(context, None, 0, 0, -1, -1)
            _steered.discard(address)
        return
    # whole, always: layers that it lacks would keep those of the vector before
    total = np.ascontiguousarray(sum(values * np.float32(scale) for values, scale in vectors))
    data = total.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    n_layer, width = total.shape
    if llama_cpp.llama_set_adapter_cvec(context, data, total.size, width, 1, n_layer):
        raise SuperegoError("llama.cpp refused the control vector")
    _steered.add(address)


def _init(model: Any, path: Path) -> Any:
    import llama_cpp

    handle = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
    if not handle:  # a null POINTER is falsy but is not None
        raise SuperegoError(f"{path}: llama.cpp could not load the adapter")
    return handle

"""Second moments of what a model's matrices read, gathered while llama.cpp runs it.

Knows llama.cpp's evaluation callback and the head of its tensor structure, whose layout is
checked at run time. Does not know what the moments are for. Works on any architecture.
"""

from __future__ import annotations

import ctypes
import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from superego.adapter import Adapter
from superego.base import BaseModel
from superego.converters.ggml_quantize import library
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.logits import ParallelContext
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

GROUP = 2048  # columns whose moments with each other are kept; wider matrices have several groups
MESSAGES, REPLY = 96, 16
_PARALLEL = 32
_PREFIX = 0.02  # what each row of the prefix counts, of all others: all later tokens read it
# Of the diagonal, added to it: a few thousand rows tell moments between columns badly, and
# unseen text loses less where they count half.
_SHRINK = 1.0
_CAP = 3.0  # median norms that a row of the prefix may have
_FLUSH = 1024  # rows multiplied at once
_BUDGET = 1 << 30  # bytes of moments held at once; more takes another run over the messages
Progress = Callable[[int, int], None]


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor, up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class Watch:
    """Sums Xᵀ X over the rows X that the named matrices read, by groups of columns."""

    def __init__(self, widths: dict[str, int]) -> None:
        import llama_cpp

        self._lib = library()
        self._lib.ggml_get_name.restype = ctypes.c_void_p
        self._lib.ggml_get_name.argtypes = [ctypes.c_void_p]
        self._lib.ggml_op_name.restype = ctypes.c_char_p
        self._lib.ggml_backend_tensor_get.restype = None
        self._lib.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]
        self._widths = widths
        self._pending: dict[str, list[np.ndarray]] = {name: [] for name in widths}
        self.rows: dict[str, int] = dict.fromkeys(widths, 0)
        self.moments = {name: [np.zeros((n, n), np.float32) for n in groups(w)]
                        for name, w in widths.items()}  # fmt: skip
        self.in_prefix = False  # set while the prefix is read
        self._prefix: dict[str, list[np.ndarray]] = {name: [] for name in widths}
        self._error: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._seen)

    def _seen(self, pointer: int, ask: bool, _: Any) -> bool:
        try:
            return self._look(pointer, ask)
        except BaseException as error:  # Ctrl-C neither: none can cross the C frames between
            self._error = error
            return False

    def _look(self, pointer: int, ask: bool) -> bool:
        tensor = _Tensor.from_address(pointer)
        if self._lib.ggml_get_name(pointer) != pointer + _Tensor.name.offset:
            raise SuperegoError(
                "this llama.cpp lays tensors out differently; use --rounding nearest"
            )
        if self._lib.ggml_op_name(tensor.op) != b"MUL_MAT":
            return False
        weight, source = (_Tensor.from_address(tensor.src[i]) for i in (0, 1))
        name = weight.name.decode("utf-8", "replace")
        if name not in self._widths:
            return False
        if ask:
            return True
        width, rows = source.ne[0], source.ne[1]
        if width != self._widths[name] or source.type != 0 or source.nb[1] != 4 * width:
            raise SuperegoError(f"{name}: its inputs in llama.cpp are not plain rows of float32")
        if not rows:  # the last layer of a batch of which no logits are wanted
            return True
        out = np.empty((rows, width), np.float32)
        self._lib.ggml_backend_tensor_get(tensor.src[1], out.ctypes.data, 0, out.nbytes)
        if self.in_prefix:
            norms = np.linalg.norm(out, axis=1, keepdims=True)
            # an attention sink's huge inputs would drown all others
            out *= np.minimum(1.0, _CAP * np.median(norms) / np.maximum(norms, 1e-30))
            self._prefix[name].append(out)
            return True
        self._pending[name].append(out)
        if sum(map(len, self._pending[name])) >= _FLUSH:
            self._flush(name)
        return True

    def _flush(self, name: str) -> None:
        if not self._pending[name]:
            return
        x = np.concatenate(self._pending[name])
        self._pending[name] = []
        self.rows[name] += len(x)
        self._add(name, x)

    def _add(self, name: str, x: np.ndarray) -> None:
        start = 0
        for gram in self.moments[name]:
            part = x[:, start : start + len(gram)]
            gram += part.T @ part
            start += len(gram)

    def finish(self) -> None:
        """Take in what is pending; raises what went wrong in a callback."""
        if self._error is not None:
            raise self._error
        for name in self._widths:
            self._flush(name)

    def weighed(self) -> dict[str, list[np.ndarray]]:
        """The moments for rounding: the prefix added, shrunk to their diagonal; call it once."""
        for name, rows in self._prefix.items():
            for x in rows:
                self._add(name, x * np.float32(np.sqrt(_PREFIX * self.rows[name])))
            for gram in self.moments[name]:
                gram[np.diag_indices_from(gram)] *= 1 + _SHRINK
        return {name: found for name, found in self.moments.items() if self.rows[name]}


def groups(width: int) -> list[int]:
    """Sizes of the column groups of a matrix, whole superblocks of 256 each but the last."""
    return [min(GROUP, width - start) for start in range(0, width, GROUP)]


def messages() -> list[str]:
    """The bundled user messages that are run, the first of those that compile uses."""
    text = importlib.resources.files("superego.converters").joinpath("seeds.txt")
    return [line for line in text.read_text("utf-8").splitlines() if line.strip()][:MESSAGES]


def gather(
    model: BaseModel,
    adapter: Adapter,
    scale: float,
    widths: dict[str, int],
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
    prompts: Sequence[str] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Moments of the inputs of the named matrices, with the adapter on, by column groups.

    They are weighed for rounding, see `Watch.weighed`.
    What is run is the persona's own greedy replies to bundled messages. Matrices that
    llama.cpp does not run as plain products (experts) have no entry.
    """
    template = ChatTemplate(model.header)
    llm = load(model, n_ctx=256, threads=threads)
    encoded = encode(llm, template, None, list(prompts or messages()))
    widest = max(map(len, encoded.rest)) + REPLY
    stop = stop_tokens(llm)
    parts: list[dict[str, int]] = [{}]
    held = 0
    for name, width in widths.items():
        size = sum(4 * n * n for n in groups(width))
        if held and held + size > _BUDGET:
            parts.append({})
            held = 0
        parts[-1][name] = width
        held += size
    found: dict[str, list[np.ndarray]] = {}
    total = len(parts) * len(encoded.rest)
    for i, part in enumerate(parts):
        watch = Watch(part)
        watch.in_prefix = True
        with ParallelContext(
            llm, encoded.prefix, _PARALLEL, widest, [(adapter, scale)], callback=watch.callback
        ) as context:
            watch.in_prefix = False
            for start in range(0, len(encoded.rest), _PARALLEL):
                context.greedy(encoded.rest[start : start + _PARALLEL], REPLY, stop)
                watch.finish()
                progress(i * len(encoded.rest) + start + _PARALLEL, total)
        found.update(watch.weighed())
    llm.close()
    return found

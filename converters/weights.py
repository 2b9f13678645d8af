"""Weights out of GGUF files, a piece at a time, in the compute type.

Knows where a tensor lies and how llama.cpp's C code dequantizes it. Does not know what a tensor
is for. Files are read, not mapped: no more than is asked for is ever this process's memory, and
a file that is cut short meanwhile is an error, not the end of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from superego.converters.ggml_quantize import library
from superego.errors import SuperegoError
from superego.gguf_file import Header, TensorInfo

# Weights dequantized at once by one thread: their float32 form stays in its cache. A multiple of
# every type's block.
_PIECE = 1 << 17


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _to_float(kind: GGMLQuantizationType) -> Callable[[int, int, int], None]:
    """C code that writes n float32 of a type: (source address, target address, n).

    Ten to thirty times as fast as gguf's numpy, which stands in where this llama.cpp has none.
    """
    block, size = GGML_QUANT_SIZES[kind]
    with contextlib.suppress(SuperegoError, AttributeError):
        lib = library()
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
        traits = lib.ggml_get_type_traits(int(kind)).contents
        if (traits.blck_size, traits.type_size) == (block, size) and traits.to_float:
            return traits.to_float

    def slowly(source: int, target: int, n: int) -> None:
        n_bytes = n // block * size
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(source))
        out = np.ctypeslib.as_array((ctypes.c_float * n).from_address(target))
        out[:] = dequantize(raw.reshape(1, -1), kind).reshape(-1)

    return slowly


@functools.cache
def _to_bfloat16() -> Callable[[int, int, int], None]:
    """C code that rounds n float32 to bfloat16, to even: (source address, target address, n)."""
    with contextlib.suppress(SuperegoError, AttributeError):
        found = library().ggml_fp32_to_bf16_row
        found.restype = None
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        return found

    def slowly(source: int, target: int, n: int) -> None:
        bits = np.ctypeslib.as_array((ctypes.c_uint32 * n).from_address(source))
        out = np.ctypeslib.as_array((ctypes.c_uint16 * n).from_address(target))
        out[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16

    return slowly


class Weights:
    """The tensors of a model's files. Methods raise SuperegoError for one that is missing."""

    def __init__(self, header: Header, dtype: torch.dtype) -> None:
        """`dtype` is that of matrices, bfloat16 or float32."""
        self.path = header.path
        self.dtype = dtype
        self._tensors = header.tensors
        self._scratch = threading.local()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies, its shape and type."""
        found = self._tensors.get(name)
        if found is None:
            raise SuperegoError(f"{self.path}: tensor {name} is missing")
        return found

    def vector(self, name: str) -> torch.Tensor:
        """A tensor of any shape, float32."""
        return self._read(self.info(name), torch.empty(self.info(name).shape, device="cpu"))

    def matrix(
        self, name: str, out: torch.Tensor | None = None, rows: slice | None = None
    ) -> torch.Tensor:
        """A tensor, or a run of its rows, in the compute type; into `out` where it is given."""
        info = self.info(name)
        start, stop = (rows.start, rows.stop) if rows else (0, info.shape[0])
        shape = (stop - start, *info.shape[1:])
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device="cpu")
        elif out.shape != shape:
            raise SuperegoError(
                f"{info.path}: tensor {name} is {shape}, expected {tuple(out.shape)} as the "
                "metadata says"
            )
        return self._read(info, out, start * math.prod(info.shape[1:]))

    def gathered(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Single rows (n, width) of a matrix, in the compute type."""
        info = self.info(name)
        distinct = sorted(set(rows))
        width, size = info.shape[1], info.n_bytes // info.shape[0]
        raw = np.empty((len(distinct), size), np.uint8)
        with self._open(info.path) as file:
            for i, row in enumerate(distinct):
                self._fill(file, info.path, info.offset + row * size, raw[i])
        found = torch.empty(len(distinct), width, dtype=self.dtype, device="cpu")
        step = max(1, _PIECE // width)
        for i in range(0, len(distinct), step):
            part = found[i : i + step]
            self._convert(info.type, raw[i : i + step].ctypes.data, part.data_ptr(), part)
        place = {row: i for i, row in enumerate(distinct)}
        return found[torch.tensor([place[row] for row in rows], device="cpu")]

    def announce(self, names: Iterable[str]) -> None:
        """Have the system read tensors from the disk while something else is computed."""
        if not hasattr(os, "posix_fadvise"):
            return
        for info in (self._tensors[name] for name in names if name in self._tensors):
            with self._open(info.path) as file:
                os.posix_fadvise(file.fileno(), info.offset, info.n_bytes, os.POSIX_FADV_WILLNEED)

    def _open(self, path: Path):  # type: ignore[no-untyped-def]  # io.FileIO
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise SuperegoError(f"{path}: cannot be read any more: {error.strerror}") from None

    @staticmethod
    def _fill(file, path: Path, offset: int, raw: np.ndarray) -> None:  # type: ignore[no-untyped-def]
        try:
            file.seek(offset)
            view, n = raw.data, 0
            while n < len(raw) and (got := file.readinto(view[n:])):
                n += got
        except OSError as error:
            raise SuperegoError(f"{path}: cannot be read: {error.strerror}") from None
        if n < len(raw):
            raise SuperegoError(
                f"{path}: ends at byte {offset + n:,} now, a tensor reaches to "
                f"{offset + len(raw):,}: it was changed while it was read; start again"
            )

    def _convert(
        self, kind: GGMLQuantizationType, source: int, target: int, like: torch.Tensor
    ) -> None:
        """`like.numel()` weights at address `source` into `target`, in the type of `like`."""
        n = like.numel()
        if like.dtype == torch.float32:
            self._floats(kind, source, target, n)
            return
        held = getattr(self._scratch, "floats", None)
        if held is None or len(held) < n:
            held = self._scratch.floats = np.empty(max(n, _PIECE), np.float32)
        self._floats(kind, source, held.ctypes.data, n)
        _to_bfloat16()(held.ctypes.data, target, n)

    @staticmethod
    def _floats(kind: GGMLQuantizationType, source: int, target: int, n: int) -> None:
        if kind == GGMLQuantizationType.F32:
            ctypes.memmove(target, source, 4 * n)
            return
        try:
            _to_float(kind)(source, target, n)
        except (NotImplementedError, ValueError) as error:  # numpy's stand-in
            raise SuperegoError(f"tensors of type {kind.name} cannot be read: {error}") from None

    def _read(self, info: TensorInfo, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Weights from number `first` on into contiguous `out`, by all of torch's threads."""
        if out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous():
            raise ValueError("expected contiguous float32 or bfloat16")
        block, size = GGML_QUANT_SIZES[info.type]
        flat = out.view(-1)

        def piece(start: int) -> None:
            part = flat[start : start + _PIECE]
            raw = getattr(self._scratch, "raw", None)
            n_bytes = part.numel() // block * size
            if raw is None or len(raw) < n_bytes:
                raw = self._scratch.raw = np.empty(max(n_bytes, 4 * _PIECE), np.uint8)
            with self._open(info.path) as file:
                offset = info.offset + (first + start) // block * size
                self._fill(file, info.path, offset, raw[:n_bytes])
            self._convert(info.type, raw.ctypes.data, part.data_ptr(), part)

        starts = range(0, flat.numel(), _PIECE)
        pool = self._threads() if len(starts) > 1 else None
        for _ in pool.map(piece, starts) if pool else map(piece, starts):
            pass
        return out

    def _threads(self) -> ThreadPoolExecutor | None:
        n = torch.get_num_threads()
        if n == 1:
            return None
        if self._pool is None or self._pool[0] != n:
            self._pool = (n, ThreadPoolExecutor(n, thread_name_prefix="dequantize"))
        return self._pool[1]

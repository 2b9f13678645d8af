"""llama.cpp's own C quantizers, called through the libraries that llama-cpp-python brings.

Knows the C functions and checks everything that they take on trust. Does not know files
or what the weights are for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quantize as quantize_in_python

from superego.errors import SuperegoError

_PYTHON = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@functools.cache
def library() -> ctypes.CDLL:
    """libggml-base, its types compared with gguf's; raises SuperegoError where it is missing."""
    spec = importlib.util.find_spec("llama_cpp")  # finds the folder, runs nothing
    folder = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "lib"
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    for name in (f"libggml-base.{suffix}", f"ggml-base.{suffix}"):
        if (folder / name).is_file():
            found = ctypes.CDLL(str(folder / name))
            break
    else:
        raise SuperegoError(f"no libggml-base in {folder}; reinstall llama-cpp-python")
    try:
        found.ggml_quantize_chunk.restype = ctypes.c_size_t
        found.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        found.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        found.ggml_blck_size.restype = ctypes.c_int64
        found.ggml_type_size.restype = ctypes.c_size_t
    except AttributeError as error:
        raise SuperegoError(f"{folder}: libggml-base lacks a function: {error}") from None
    return found


def quantize(
    rows: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """(n, in) float32 -> (n, bytes a row) uint8, quantized as llama.cpp does it.

    `importance` (in,) weighs columns where the type's quantizer can use it. Raises
    SuperegoError for values that are not finite and for widths the type has no blocks for.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n, width = rows.shape
    block, size = GGML_QUANT_SIZES[kind]
    if width % block:
        raise SuperegoError(f"rows of {width} values do not fit {kind.name}'s blocks of {block}")
    if not np.isfinite(rows).all():
        raise SuperegoError("weights are not finite")
    if kind in _PYTHON:
        with np.errstate(over="ignore"):  # checked on the next lines
            out = quantize_in_python(rows, kind)
        if kind == GGMLQuantizationType.F16 and not np.isfinite(out).all():
            raise SuperegoError(f"weights of up to {np.abs(rows).max():.3g} overflow float16")
        return np.ascontiguousarray(out).view(np.uint8).reshape(n, -1)
    lib = library()
    if (lib.ggml_blck_size(int(kind)), lib.ggml_type_size(int(kind))) != (block, size):
        raise SuperegoError(
            f"llama.cpp's {kind.name} has other blocks than gguf's; install matching versions"
        )
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32)
        if weights.shape != (width,) or not np.isfinite(weights).all():
            raise SuperegoError(f"importance of shape {weights.shape}, expected ({width},), finite")
    elif lib.ggml_quantize_requires_imatrix(int(kind)):
        weights = np.ones(width, np.float32)
    out = np.empty((n, width // block * size), np.uint8)
    written = lib.ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n,
        width,
        weights.ctypes.data if weights is not None else None,
    )
    if written != out.nbytes:
        raise SuperegoError(f"llama.cpp quantized {written} bytes, expected {out.nbytes}")
    return out


def quantize_file(source: Path, target: Path, ftype: int, threads: int) -> None:
    """`llama_model_quantize`: a whole model in one of llama.cpp's mixtures; raises SuperegoError.

    Already quantized tensors are quantized again.
    """
    import llama_cpp

    from superego.runtime import silence

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = threads
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if code:
        raise SuperegoError(
            f"llama.cpp could not quantize {source} (code {code}); is the disk full?"
        )

"""Products of rows with matrices, each by the library that is quickest at it on this machine.

Knows torch's libraries and the machine. Does not know models. In float32 on x86, oneDNN has a
quarter to two thirds more than MKL at these products on AMD's processors, and FBGEMM reads
matrices in float16, half as many bytes, which is what few rows wait for.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

_PROBED = 0.2  # seconds of products of each type, about
_PRODUCT = 2.0 * 1024 * 576 * 1536  # operations of one
_HOPELESS = 4  # times slower than what there is
FEW = 256  # rows up to which a light matrix is quicker


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As torch.nn.functional.linear: rows (…, in), weight (out, in) -> (…, out)."""
    direct = rows.dtype == torch.float32 and rows.device.type == "cpu" and _has_onednn()
    if direct and not torch.is_grad_enabled():  # it knows no gradients
        return _by_onednn(rows, weight, bias)
    return F.linear(rows, weight, bias)


def _by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class Light:
    """A matrix in float16, for products with few rows of float32, which are summed in float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight` is (out, in), float32."""
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def linear(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(n, in) -> (n, out)."""
        found = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return found if bias is None else found.add_(bias)


def has_light(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether light matrices are there, and quicker than matrices of this type."""
    return dtype == torch.float32 and device.type == "cpu" and _has_fbgemm()


def to_light_(weight: torch.Tensor) -> None:
    """Round a matrix, in place, to the numbers that a light one has."""
    weight.copy_(weight.half())


@functools.cache
def _has_onednn() -> bool:
    return _works(_by_onednn)


@functools.cache
def _has_fbgemm() -> bool:
    return _works(lambda rows, weight, bias: Light(weight).linear(rows, bias))


def _works(product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    """Whether a library's product is there on this processor, and right."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        found = product(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    except (AttributeError, RuntimeError):  # a torch or a processor without it
        return False
    return bool((found == 4).all())


def probe_dtype() -> tuple[torch.dtype, float]:
    """The faster of bfloat16 and float32 for this machine's matmuls, and its GFLOP/s.

    Measured once a process for each device and number of threads.
    """
    return _probed(torch.get_default_device(), torch.get_num_threads())


@functools.cache
def _probed(device: torch.device, threads: int) -> tuple[torch.dtype, float]:
    best, best_rate = torch.float32, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        linear(a, b)
        seconds: list[float] = []
        while len(seconds) < 5 or (len(seconds) < 20 and sum(seconds) < _PROBED):
            start = time.perf_counter()
            found = linear(a, b)
            if device.type != "cpu":  # it is only asked for yet: wait until it is there
                found[0, 0].item()
            seconds.append(time.perf_counter() - start)
            if _PRODUCT / seconds[-1] < best_rate / _HOPELESS:
                break  # emulated: four more tell nothing
        # the quick quarter: other programs slow a product down, nothing speeds one up
        rate = _PRODUCT / sorted(seconds)[len(seconds) // 4]
        if rate > best_rate * 1.2:  # bfloat16 must win clearly: it costs precision
            best, best_rate = dtype, rate
    return best, best_rate / 1e9

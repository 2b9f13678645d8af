"""This machine: processor, memory, disk and folders, as its system tells of them.

Knows Linux's and macOS' words for processor features and llama.cpp's. Starts no computation.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What llama.cpp calls it -> what Linux calls it. (Its AVX512 is several, the first of them this.)
_LINUX = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX_VNNI": "avx_vnni", "AVX2": "avx2",
    "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd", "ARM_FMA": "asimd", "FP16_VA": "asimdhp", "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm", "SVE": "sve", "SME": "sme",
}  # fmt: skip
_MACOS = {
    "SSE3": "SSE3", "SSSE3": "SSSE3", "AVX": "AVX1.0", "AVX2": "AVX2", "F16C": "F16C",
    "FMA": "FMA", "BMI2": "BMI2", "AVX512": "AVX512F", "AVX512_VNNI": "AVX512VNNI",
    "NEON": "hw.optional.arm.AdvSIMD", "ARM_FMA": "hw.optional.arm.AdvSIMD",
    "FP16_VA": "hw.optional.arm.FEAT_FP16", "DOTPROD": "hw.optional.arm.FEAT_DotProd",
    "MATMUL_INT8": "hw.optional.arm.FEAT_I8MM", "SME": "hw.optional.arm.FEAT_SME",
}  # fmt: skip
# Shown, though no name of llama.cpp's build
_ALSO = {"bf16": ("avx512_bf16", "amx_bf16", "bf16", "hw.optional.arm.FEAT_BF16")}
_AMX_TILE_DATA = 18  # the kernel's number for the state that AMX needs


def cpu() -> dict[str, Any]:
    """Name, cores, and the features that llama.cpp has names for; None where nobody says."""
    name, words = "", None
    try:
        if sys.platform == "linux":
            name, words = from_cpuinfo(Path("/proc/cpuinfo").read_text("utf-8", "replace"))
        elif sys.platform == "darwin":
            name, words = from_sysctl(_sysctl())
    except (OSError, subprocess.SubprocessError):
        pass
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": name or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable cores": len(affinity(0)) if affinity else os.cpu_count(),
        "features": None if words is None else features(words),
        "AMX permitted": amx_permitted(),
    }


def from_cpuinfo(text: str) -> tuple[str, set[str]]:
    """A processor's name and feature words out of Linux's /proc/cpuinfo."""
    name, words = "", set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            words |= set(value.split())
    return name, words


def from_sysctl(text: str) -> tuple[str, set[str]]:
    """A processor's name and feature words out of macOS' sysctl."""
    name, words = "", set()
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key == "machdep.cpu.brand_string":
            name = value.strip()
        elif key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            words |= set(value.split())
        elif key.startswith("hw.optional.") and value.strip() == "1":
            words.add(key)
            if key in ("hw.optional.neon", "hw.optional.AdvSIMD"):  # as older systems have it
                words.add("hw.optional.arm.AdvSIMD")
    return name, words


def features(words: set[str]) -> list[str]:
    """llama.cpp's names for what is in a system's words, `bf16` with them."""
    table = _MACOS if any(w.startswith("hw.") or w.isupper() for w in words) else _LINUX
    found = [ours for ours, theirs in table.items() if theirs in words]
    return found + [ours for ours, any_of in _ALSO.items() if words & set(any_of)]


def named(feature: str) -> bool:
    """Whether we would know if this processor lacked it."""
    if sys.platform == "darwin":
        return feature in _MACOS
    return sys.platform == "linux" and feature in _LINUX


def amx_permitted() -> bool | None:
    """Whether the system lets this process use AMX tiles; None where it is no question."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    mask = ctypes.c_uint64()
    try:
        failed = ctypes.CDLL(None).syscall(158, 0x1021, ctypes.byref(mask))  # ARCH_GET_XCOMP_SUPP
    except (OSError, AttributeError):
        return None
    return not failed and bool(mask.value >> _AMX_TILE_DATA & 1)


def memory() -> dict[str, int | None]:
    """Bytes of memory: all of it, and what is free for us (a container's limit counted)."""
    total = available = None
    try:
        import psutil

        found = psutil.virtual_memory()
        total, available = int(found.total), int(found.available)
    except Exception:  # a broken psutil is told elsewhere
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return {"total": None, "available": None}
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total = min(total, limit)
        available = min(total if available is None else available, max(0, limit - used))
    except (OSError, ValueError):
        pass  # no limit ("max"), or no such system
    return {"total": total, "available": available}


def folder(path: Path) -> dict[str, Any]:
    """A folder's files and bytes, the disk's free bytes, and why it cannot be written, if so.

    One that is not there yet is as writable as its nearest parent that is.
    """
    files = held = 0
    for root, _, names in os.walk(path):
        for name in names:
            try:
                held += os.lstat(os.path.join(root, name)).st_size
                files += 1
            except OSError:
                continue
    there = path
    while not there.exists() and there.parent != there:
        there = there.parent
    wrong = ""
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        wrong = error.strerror or str(error)
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {
        "folder": str(path),
        "exists": path.is_dir(),
        "files": files,
        "bytes": held,
        "free": free,
        "not writable": wrong,
    }


def _sysctl() -> str:
    command = ["sysctl", "machdep.cpu", "hw.optional"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout

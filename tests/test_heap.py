"""Memory that is given back is allocated again without the system being asked for it."""

from __future__ import annotations

import platform

import pytest
import torch

from superego.converters.heap import kept_heap


def faults() -> int:
    """Pages that the system has handed out so far, while a large block comes and goes."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_within_it_a_large_block_comes_to_be_handed_out_once_and_behind_it_anew() -> None:
    once = 0.6 * (64 << 20) / 4096
    with kept_heap():  # the first blocks come where the heap has no hole of their size yet
        assert min(faults() for _ in range(10)) < once
    assert faults() > once


def test_elsewhere_nothing_is_asked_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", asked.append)
    with kept_heap():
        pass
    assert not asked

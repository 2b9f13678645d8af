"""Memory that is given back is allocated again without the system being asked for it; then not."""

from __future__ import annotations

import platform
from types import SimpleNamespace

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
def test_within_it_a_large_block_comes_to_be_handed_out_once() -> None:
    with kept_heap():  # the first blocks come where the heap has no hole of their size yet
        assert min(faults() for _ in range(10)) < 0.6 * (64 << 20) / 4096


def test_behind_it_the_allocator_is_as_it_was_even_where_work_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_to: dict[int, int] = {}
    trimmed: list[int] = []
    libc = SimpleNamespace(mallopt=set_to.__setitem__, malloc_trim=trimmed.append)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    mmaps, trim, threshold = -4, -1, -3

    def work() -> None:
        with kept_heap():
            assert (set_to[mmaps], set_to[trim]) == (0, -1)
            raise ValueError("work")

    with pytest.raises(ValueError, match="work"):
        work()
    assert (set_to[mmaps], set_to[trim], set_to[threshold]) == (65536, 64 << 20, 32 << 20)
    assert trimmed == [0]


def test_elsewhere_nothing_is_asked_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", asked.append)
    with kept_heap():
        pass
    assert not asked

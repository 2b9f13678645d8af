"""Where torch computes: the processor, or a GPU.

Knows which devices this torch can use. Does not know what is computed on them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from superego.errors import SuperegoError

DEVICES = ("auto", "cpu", "mps", "cuda")


def pick_device(name: str = "auto") -> torch.device:
    """The named device; auto: cuda, then mps, then cpu. Raises SuperegoError where it is absent."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    if name not in there:
        raise SuperegoError(f"device '{name}': expected one of {', '.join(DEVICES)}")
    if not there[name]:
        found = [kind for kind, is_there in there.items() if is_there]
        raise SuperegoError(
            f"device '{name}': torch {torch.__version__} finds none on this machine (it finds "
            f"{', '.join(found)}); use --device {found[0]}, or install a torch built for {name}"
        )
    return torch.device(name)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it new tensors lie on the device."""
    # the context looks at every call into torch; the processor is where they go without it
    return contextlib.nullcontext() if device.type == "cpu" else device


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a GPU of its own; None where the machine's memory is what counts."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None

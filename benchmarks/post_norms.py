"""The target of the fit behind a norm (gemma2, gemma3): what it recovers beside what is simpler.

Tiny random models and random text: figures tell the targets apart and say nothing about quality.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from superego.base import open_base
from superego.converters.closed_form import solve
from superego.converters.streams import Conversation, Pack, Prefixes, Streams, mean_kl, predictions
from superego.converters.transformer import Base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import TINY, build

LEFT_OUT = {
    "as it is": {"weigh": Streams.weigh},
    "the norm linearized": {"reachable": lambda self, rows, prefix: (rows, prefix)},
    "inputs not weighed": {"weigh": lambda self, rows, prefix: [rows, prefix]},
}


def recovered(base: Base, ridge: float) -> float:
    """KL recovered in torch on 40 texts that a fit of 60 did not see."""
    rng = np.random.default_rng(9)

    def text(n: int) -> list[int]:
        return rng.integers(3, base.shape.n_vocab - 6, n).tolist()

    prefixes = Prefixes([*text(40), 4, 5], [7, 8, 4, 5])
    talks = [Conversation(text(5), text(8)) for _ in range(100)]
    teacher, student = (Pack(talks[60:], p) for p in (prefixes.teacher, prefixes.student))
    target = predictions(base, teacher)
    before = mean_kl(base, student, target, predictions(base, student))
    ridges = {"attn_output": ridge, "ffn_down": 3 * ridge}
    changes = solve(base, talks[:60], prefixes, 64, ridges)
    return 1 - mean_kl(base, student, target, predictions(base, student, changes)) / before


def main() -> None:
    torch.set_grad_enabled(False)
    print(f"| architecture | seed | ridge | {' | '.join(LEFT_OUT)} |")
    print("|---" * (3 + len(LEFT_OUT)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("gemma2", "gemma3"):
            for seed in (0, 1):
                path = build(Path(folder) / f"{name}-{seed}.gguf", TINY[name], seed)
                base = Base(open_base(str(path)).header, torch.float32, resident=True)
                for ridge in (0.05, 0.4):
                    found = []
                    for changed in LEFT_OUT.values():
                        with patch.multiple(Streams, **changed):
                            found.append(f"{recovered(base, ridge):.2f}")
                    print(f"| {name} | {seed} | {ridge} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

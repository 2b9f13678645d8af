"""Peak memory and time of compiles on random models of real shapes, as a Markdown table.

    python benchmarks/sizes.py Llama-3.2-1B --memory 3
    python benchmarks/sizes.py Llama-3.1-8B --memory 9 --layers 4 --effort quick

With --layers the model has its first layers alone. The floor is the arithmetic that a fit cannot
do without (docs/sizes.md) over the measured speed of a large matrix product, of each type. Memory
is this process's own, read from /proc/self/status every 20 ms, anonymous memory and file pages
apart (weights are read, not mapped, so that the file lies in the page cache, which the system
takes back when it needs to).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from random_models import MODELS, write

from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters.compile import Settings, compile_manifesto
from superego.converters.linear_algebra import EXTRA
from superego.converters.products import probe_dtype
from superego.converters.shape import read_shape
from superego.progress import Steps

FIELDS = ("VmRSS", "RssAnon", "RssFile")


class Watched(Steps):
    """Notes the peak of each kind of memory while each step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.step = "start"
        self.peaks: dict[tuple[str, str], float] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            for name in FIELDS:
                found = re.search(rf"{name}:\s+(\d+)", status)
                value = int(found[1]) * 1024 / 1e9 if found else 0.0
                key = (self.step, name)
                self.peaks[key] = max(self.peaks.get(key, 0.0), value)
            time.sleep(0.02)

    def update(self, label: str, done: float, total: float) -> None:
        self.step = label
        super().update(label, done, total)


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    F.linear(a, b)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        F.linear(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(seconds) / 1e9


def floor(model: BaseModel, rows: float, rank: int, peaks: dict[str, float], compute: str) -> float:
    """Seconds of a fit whose every operation ran at the speed of a large matrix product.

    `compute` is the type of the walks and moments; factors and solves are float32 always.
    """
    shape = read_shape(model.header)
    d, heads, kv = shape.d_model, *(n * shape.head_dim for n in (shape.n_head, shape.n_head_kv))
    weights = 2 * d * (heads + kv) + 3 * d * shape.d_ff
    half = full = 0.0
    for width in (heads, shape.d_ff):
        half += rows * width**2 + 2 * rows * width * d  # the upper half of XᵀX, and RᵀX
        full += width**3 / 3 + 9 * 2 * (rank + EXTRA) * width**2  # factor, solves
    half += 2 * 2 * rows * weights  # teacher's and student's walk
    full += 2 * rows * d**2  # where there is a slot: the covariance of all rows
    return shape.n_layer * (half / peaks[compute] + full / peaks["float32"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--memory", type=float)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--effort", default="standard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="superego-sizes-") as folder:
        began = time.perf_counter()
        path = write(MODELS[options.model], Path(folder) / "base.gguf", options.layers)
        with torch.no_grad():
            kinds = {torch.float32, probe_dtype()[0]}  # bfloat16 takes minutes where it is emulated
            peaks = {str(d)[6:]: round(peak(d)) for d in kinds}
        size = path.stat().st_size
        print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        steps = Watched()
        settings, model = Settings.for_effort(options.effort), open_base(str(path))
        report = compile_manifesto(
            bundled()["pirate"],
            model,
            Path(folder) / "out.gguf",
            settings,
            use_cache=False,
            steps=steps,
            memory=options.memory,
        )
        # the walks and the moments read the rows that are fitted, not those kept unseen
        rows = report["reference tokens"] * (1 - settings.unseen / report["references"])
        least = floor(model, rows, report["rank"], peaks, report["compute type"])
    report |= {
        "file GB": round(size / 1e9, 2),
        "fit's floor, seconds": round(least, 1),
        "fit's share of the floor": round(least / report["seconds"]["fit"], 3),
    }
    print(json.dumps({"model": options.model, "peak GFLOP/s": peaks, **report}, indent=2))
    print("\n| step | " + " | ".join(f"{name} GB" for name in FIELDS) + " |\n|---|---|---|---|")
    for step in dict.fromkeys(step for step, _ in steps.peaks):
        values = " | ".join(f"{steps.peaks[step, name]:.2f}" for name in FIELDS)
        print(f"| {step} | {values} |")


if __name__ == "__main__":
    main()

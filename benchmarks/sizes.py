"""Peak memory and time of compiles on random models of real shapes, as a Markdown table.

    python benchmarks/sizes.py Llama-3.2-1B --memory 3
    python benchmarks/sizes.py Llama-3.1-8B --memory 9 --layers 4 --effort quick

With --layers the model has its first layers alone. Memory is this process's own, read from
/proc/self/status every 20 ms, anonymous memory and file pages apart (weights are read, not mapped,
so that the file lies in the page cache, which the system takes back when it needs to).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from random_models import MODELS, write

from superego.base import open_base
from superego.bundled import bundled
from superego.converters.compile import Settings, compile_manifesto
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--memory", type=float)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--effort", default="standard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="superego-sizes-") as folder:
        path = write(MODELS[options.model], Path(folder) / "base.gguf", options.layers)
        with torch.no_grad():
            peaks = {str(d)[6:]: round(peak(d)) for d in (torch.float32, torch.bfloat16)}
        steps = Watched()
        report = compile_manifesto(
            bundled()["pirate"],
            open_base(str(path)),
            Path(folder) / "out.gguf",
            Settings.for_effort(options.effort),
            use_cache=False,
            steps=steps,
            memory=options.memory,
        )
    print(json.dumps({"model": options.model, "peak GFLOP/s": peaks, **report}, indent=2))
    print("\n| step | " + " | ".join(f"{name} GB" for name in FIELDS) + " |\n|---|---|---|---|")
    for step in dict.fromkeys(step for step, _ in steps.peaks):
        values = " | ".join(f"{steps.peaks[step, name]:.2f}" for name in FIELDS)
        print(f"| {step} | {values} |")


if __name__ == "__main__":
    main()

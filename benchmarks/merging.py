"""What merging keeps of an adapter: every type, by the real command, measured in llama.cpp.

Prints a Markdown table. Merged models and what their commands reported stay in --out, and
are not made again. Held-out prompts are used here and in `superego evaluate` alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from superego.adapter import read_adapter
from superego.base import open_base
from superego.evaluate import bundled as lines
from superego.evaluate_merged import evaluate_merged

SUPEREGO = str(Path(sys.executable).parent / "superego")
VARIANTS = {
    "same, nearest": ["--rounding", "nearest"],
    "same": [],
    "same, --keep, nearest": ["--keep", "--rounding", "nearest"],
    "same, --keep": ["--keep"],
    "Q4_K_M, nearest": ["--type", "Q4_K_M", "--rounding", "nearest"],
    "Q4_K_M": ["--type", "Q4_K_M"],
    "Q4_K_M, --keep": ["--type", "Q4_K_M", "--keep"],
    "Q8_0": ["--type", "Q8_0"],
    "F16": ["--type", "F16"],
}


def merged(adapter: Path, base: str, variant: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """One merge by the real command: its file and what it reported."""
    slug = variant.replace(", ", "-").replace("--", "-")
    path = out / f"{adapter.stem}-{slug}.gguf"
    report = path.with_suffix(".json")
    if not (path.exists() and report.exists()):
        command = [SUPEREGO, "merge", str(adapter), "--base", base, "-o", str(path), "--json"]
        done = subprocess.run(
            [*command, *VARIANTS[variant]], check=True, capture_output=True, text=True
        )
        report.write_text(done.stdout)
    return path, json.loads(report.read_text())


def main() -> None:
    """Merges and measures; `--merge-only` leaves the measuring to another run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--prompts", type=int, default=32, help="how many held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--merge-only", action="store_true")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT"
    )
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    made = {
        (adapter, variant): merged(adapter, options.base, variant, options.out)
        for adapter in options.adapters
        for variant in options.variants
    }
    if options.merge_only:
        return
    base = open_base(options.base)
    print(
        "| persona | written | KL recovered (95 %) | of the adapter's | top-1 | file MB (base) "
        "| rounding error: attn_output, ffn_down | seconds | peak MB |\n" + "|---" * 9 + "|"
    )
    for path in options.adapters:
        adapter = read_adapter(path)
        own, *rest = evaluate_merged(
            base,
            adapter.own["manifesto"],
            [(adapter, 1.0), *(open_base(str(made[path, v][0])) for v in options.variants)],
            lines("heldout")[: options.prompts],
        )
        for variant, report in zip(["adapter", *options.variants], [own, *rest], strict=True):
            k = report.kl_recovered
            row = (
                f"| {adapter.name} | {variant} | {k.value:.3f} ({k.low:.3f}–{k.high:.3f}) "
                f"| {k.value / own.kl_recovered.value:.0%} | {report.top1_merged:.3f} "
            )
            if variant == "adapter":
                row += f"| +{report.bytes / 1e6:.1f} | | | |"
            else:
                done = made[path, variant][1]
                errors = done["rounding error"]
                row += (
                    f"| {report.bytes / 1e6:.1f} ({base.header.size / 1e6:.1f}) "
                    f"| {errors['attn_output']:.2f}, {errors['ffn_down']:.2f} "
                    f"| {done['seconds']['total']:.0f} "
                    f"| {done['peak memory MB']} |"
                )
            print(row, flush=True)


if __name__ == "__main__":
    main()

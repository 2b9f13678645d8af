"""The bench: every persona at every effort, compiled cold, measured in llama.cpp.

Writes results.json after each persona and prints the Markdown tables at the end. Held-out
prompts are used here and in `superego evaluate` alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import superego
from superego.adapter import read_adapter
from superego.base import open_base
from superego.bundled import bundled
from superego.evaluate import bundled as lines
from superego.evaluate import evaluate, run_cost
from superego.runtime import load
from superego.template import ChatTemplate

SUPEREGO = str(Path(sys.executable).parent / "superego")


def compiled(name: str, effort: str, base: str, out: Path) -> dict[str, Any]:
    """One cold compile by the real command: its report, with the whole command's seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [SUPEREGO, "compile", name, "--base", base, "-o", str(out), "--effort", effort]
        + ["--no-cache", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {**json.loads(done.stdout), "command seconds": round(time.perf_counter() - start, 1)}


def cost(base: str, name: str, adapter: Path, prompts: list[str]) -> dict[str, Any]:
    """Prompt tokens, time to first token and decode speed of three ways, one live model."""
    model = open_base(base)
    llm, template = load(model, n_ctx=2048), ChatTemplate(model.header)
    run_cost(llm, template, None, prompts[:2])
    ways = {
        "bare": run_cost(llm, template, None, prompts),
        "system message": run_cost(llm, template, bundled()[name].body, prompts),
    }
    with superego.attach(llm, adapter):
        ways["adapter"] = run_cost(llm, template, None, prompts)
    return {way: vars(found) for way, found in ways.items()}


def tables(results: dict[str, Any]) -> str:
    """The Markdown tables of what has been measured so far."""
    head = (
        "| persona | effort | KL recovered (95 %) | top-1 (bare) | drift (system) | "
        "specificity | KL adapter + system | seconds: references / fit / whole | MB | "
        "adapter MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    body, means = "", ""
    by_effort: dict[str, list[dict[str, Any]]] = {}
    for name, persona in results["personas"].items():
        for effort, row in persona["efforts"].items():
            by_effort.setdefault(effort, []).append(row)
            r, c = row["report"], row["compile"]
            k = r["kl_recovered"]
            body += (
                f"| {name} | {effort} | {k['value']:.3f} ({k['low']:.3f}–{k['high']:.3f}) "
                f"| {r['top1_adapter']:.3f} ({r['top1_base']:.3f}) "
                f"| {r['drift_adapter']:.3f} ({r['drift_system']:.3f}) | {r['specificity']:.2f} "
                f"| {r['kl_with_system']:.3f} | {c['seconds']['references']:.0f} / "
                f"{c['seconds']['fit']:.0f} / {c['command seconds']:.0f} "
                f"| {c['peak memory MB']} | {c['bytes'] / 1e6:.0f} |\n"
            )
    for effort, rows in by_effort.items():
        values = [r["report"]["kl_recovered"]["value"] for r in rows]
        seconds = [r["compile"]["command seconds"] for r in rows]
        means += (
            f"{effort}: {len(rows)} personas, mean KL recovered {statistics.mean(values):.3f}, "
            f"lowest {min(values):.3f}; seconds median {statistics.median(seconds):.0f}, "
            f"highest {max(seconds):.0f}\n"
        )
    return head + body + "\n" + means


def main() -> None:
    """Compiles and measures; `--efforts quick standard` and `--personas …` narrow it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--efforts", nargs="+", default=["quick", "standard", "thorough"])
    parser.add_argument("--personas", nargs="+", default=list(bundled()))
    parser.add_argument("--prompts", type=int, default=96, help="how many held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"personas": {}}
    results.update(date=date.today().isoformat(), machine=platform.platform())
    prompts = lines("heldout")[: options.prompts]
    adapters = {}
    for name in options.personas:
        for effort in options.efforts:
            adapters[name, effort] = options.out / f"{name}-{effort}.gguf"
    # another persona's adapter, for specificity: the one before in the list
    before = {n: options.personas[i - 1] for i, n in enumerate(options.personas)}
    reports: dict[tuple[str, str], dict[str, Any]] = {}

    def ready(name: str) -> None:
        for effort in options.efforts:
            if (name, effort) not in reports:
                reports[name, effort] = compiled(name, effort, options.base, adapters[name, effort])
                print(name, effort, json.dumps(reports[name, effort]["seconds"]), flush=True)

    for name in options.personas:
        ready(before[name])
        ready(name)
        measured = evaluate(
            open_base(options.base),
            bundled()[name].body,
            [(read_adapter(adapters[name, effort]), 1.0) for effort in options.efforts],
            prompts,
            foreign=(read_adapter(adapters[before[name], options.efforts[-1]]), 1.0),
        )
        persona = results["personas"].setdefault(name, {"efforts": {}})
        for effort, report in zip(options.efforts, measured, strict=True):
            persona["efforts"][effort] = {
                "compile": reports[name, effort],
                "report": report.as_dict(),
            }
            print(name, effort, report.kl_recovered, flush=True)
        last = adapters[name, options.efforts[-1]]
        persona["cost"] = cost(options.base, name, last, prompts[:8])
        path.write_text(json.dumps(results, indent=1))
    print(tables(results))


if __name__ == "__main__":
    main()

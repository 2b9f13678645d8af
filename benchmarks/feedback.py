"""The feedback loop's bench: seconds from save to reply, and ten amendments in a row.

`stages` watches a manifesto, saves edits into it and prints every stage's time. `ten` makes
ten amendments and measures the last adapter beside one compile of the final manifesto, in
llama.cpp on held-out prompts. Both print Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from superego.adapter import read_adapter
from superego.base import open_base
from superego.bundled import bundled
from superego.converters.amend import amend, amended
from superego.converters.compile import Settings, compile_manifesto, open_for_compile
from superego.converters.watch import Problem, Workshop, watch
from superego.evaluate import bundled as lines
from superego.evaluate import evaluate
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.runtime import default_threads, load

AMENDMENTS = (
    "Also: never promise anything.",
    "Also: say where a number comes from.",
    "Also: name one risk of whatever you advise.",
    "Also: use the metric system.",
    "Also: prefer short words to long ones.",
    "Also: when a question is about health, say when to see a doctor.",
    "Also: do not use exclamation marks.",
    "Also: admit what you do not know.",
    "Also: end with the one thing to do first.",
    "Also: speak well of those who are absent.",
)


def stages(base: str, name: str, saves: int) -> None:
    """Saves `saves` edits, the way editors do (a new file renamed onto the old one)."""
    question = "Should I lend my brother money?"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifesto.md"
        manifesto = bundled()[name]
        path.write_text(manifesto.body)
        started = time.perf_counter()
        workshop = Workshop(open_base(base), Path(folder) / "out.gguf", [question])
        print(f"base opened, warmed and asked in {time.perf_counter() - started:.1f} s\n")
        stop = threading.Event()

        def save(text: str) -> None:
            time.sleep(1.0)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, path)

        body = manifesto.body
        for done, event in enumerate(watch(path, workshop, stop)):
            if isinstance(event, Problem):
                raise SystemExit(event.message)
            if not done:
                print("| save | kept | KL recovered | " + " | ".join(event.seconds) + " |")
                print("|---" * (3 + len(event.seconds)) + "|", flush=True)
            figures = " | ".join(f"{value:.2f}" for value in event.seconds.values())
            label = f"edit {done}" if done else "first, nothing kept"
            kept = f"{event.kept} of {event.references}"
            print(f"| {label} | {kept} | {event.recovered:.3f} | {figures} |", flush=True)
            if done == saves:
                break
            body += f"\n\n{AMENDMENTS[done]}"
            threading.Thread(target=save, args=(body,)).start()


def ten(base: str, name: str, prompts: int, effort: str) -> None:
    """Amend ten times; then compile the final manifesto once, without the cache."""
    model = open_base(base)
    torch.set_num_threads(default_threads())
    torch.set_grad_enabled(False)
    opened = open_for_compile(model, load(model, vocab_only=True), Steps(quiet=True))
    with tempfile.TemporaryDirectory() as folder:
        path, once = Path(folder) / "amended.gguf", Path(folder) / "once.gguf"
        manifesto: Manifesto = replace(bundled()[name])
        settings = Settings.for_effort(effort)
        report = compile_manifesto(manifesto, model, path, settings, opened=opened)
        print("| amendment | references kept | KL recovered, unseen references | seconds |")
        print("|---|---|---|---|")
        for number, text in enumerate(AMENDMENTS, 1):
            report = amend(read_adapter(path), text, model, path, by="", opened=opened)
            manifesto = amended(manifesto, text)
            print(
                f"| {number} | {report['references kept']} of {report['references']} "
                f"| {report['kl recovered on unseen references']:.3f} "
                f"| {report['seconds']['total']:.1f} |",
                flush=True,
            )
        compile_manifesto(manifesto, model, once, settings, use_cache=False, opened=opened)
        both = [(read_adapter(path), 1.0), (read_adapter(once), 1.0)]
        found = evaluate(model, manifesto.body, both, lines("heldout")[:prompts])
    print("\n| the final manifesto | KL recovered, held-out (95 %) |\n|---|---|")
    for label, each in zip(("amended ten times", "compiled once"), found, strict=True):
        k = each.kl_recovered
        print(f"| {label} | {k.value:.3f} ({k.low:.3f}–{k.high:.3f}) |")
    gap = found[1].kl_recovered.value - found[0].kl_recovered.value
    print(f"\nLost by amending: {gap:.3f} (the aim: at most 0.03)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["stages", "ten"])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--persona", default="steward")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--effort", default="quick")
    options = parser.parse_args()
    if options.part == "stages":
        stages(options.base, options.persona, options.saves)
    else:
        ten(options.base, options.persona, options.prompts, options.effort)


if __name__ == "__main__":
    main()

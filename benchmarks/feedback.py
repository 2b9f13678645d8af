"""The feedback loop's bench: seconds from save to reply, amendments in a row, blends.

`stages` watches a manifesto, saves edits into it and prints every stage's time. `ten` makes
ten amendments and compiles the final manifesto once; with `--prompts` both are measured in
llama.cpp on held-out prompts. `blend` measures two adapters together beside a system message
that holds both manifestos, on messages that neither was fitted on. All print Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from superego.adapter import read_adapter
from superego.base import open_base
from superego.blend import blend
from superego.bundled import bundled
from superego.converters.amend import amend, amended
from superego.converters.compile import Settings, compile_manifesto, open_for_compile
from superego.converters.slot import Slots
from superego.converters.watch import Problem, Workshop, watch
from superego.dialogue import encode
from superego.evaluate import bundled as lines
from superego.evaluate import evaluate
from superego.exchanges import unused_prompts
from superego.progress import Steps
from superego.replay import Variant, divergences, replies
from superego.runtime import default_threads, load, stop_tokens
from superego.template import ChatTemplate

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
SCALES = ((1.0, 1.0), (0.7, 0.7), (0.5, 0.5))  # of the two in a blend


def stages(base: str, name: str, saves: int) -> None:
    """Saves `saves` edits, the way editors do (a new file renamed onto the old one)."""
    question = "Should I lend my brother money?"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifesto.md"
        body = bundled()[name].body
        path.write_text(body)
        started = time.perf_counter()
        workshop = Workshop(open_base(base), Path(folder) / "out.gguf", [question])
        print(f"base opened and asked in {time.perf_counter() - started:.1f} s\n")

        def save(text: str) -> None:
            time.sleep(1.0)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, path)

        for done, event in enumerate(watch(path, workshop, threading.Event())):
            if isinstance(event, Problem):
                raise SystemExit(event.message)
            if not done:
                print("| save | kept | KL recovered | " + " | ".join(event.seconds) + " |")
                print("|---" * (3 + len(event.seconds)) + "|", flush=True)
            figures = " | ".join(f"{value:.2f}" for value in event.seconds.values())
            label = f"edit {done}" if done else "the file as it was"
            kept = f"{event.kept} of {event.references}"
            print(f"| {label} | {kept} | {event.recovered:.3f} | {figures} |", flush=True)
            if done == saves:
                break
            body += f"\n\n{AMENDMENTS[done]}"
            threading.Thread(target=save, args=(body,)).start()


def ten(base: str, name: str, prompts: int, effort: str, folder: Path) -> None:
    """Amend ten times; then compile the final manifesto once, without the cache."""
    model = open_base(base)
    torch.set_num_threads(default_threads())
    torch.set_grad_enabled(False)
    opened = open_for_compile(model, load(model, vocab_only=True), Steps(quiet=True))
    path, once = folder / "amended.gguf", folder / "once.gguf"
    manifesto = bundled()[name]
    settings = Settings.for_effort(effort)
    compile_manifesto(manifesto, model, path, settings, opened=opened)
    print("| amendment | references kept | KL recovered, unseen references | seconds |")
    print("|---|---|---|---|")
    for number, text in enumerate(AMENDMENTS, 1):
        report = amend(read_adapter(path), text, model, path, by="", opened=opened)
        manifesto = amended(manifesto, text)
        kept = f"{report['references kept']} of {report['references']}"
        print(f"| {number} | {kept} | {_figures(report)} |", flush=True)
    fresh = replace(opened, slots=Slots())
    report = compile_manifesto(manifesto, model, once, settings, use_cache=False, opened=fresh)
    print(f"| compiled once | none | {_figures(report)} |", flush=True)
    if not prompts:
        return
    both = [(read_adapter(path), 1.0), (read_adapter(once), 1.0)]
    found = evaluate(model, manifesto.body, both, lines("heldout")[:prompts])
    print("\n| the final manifesto | KL recovered, held-out (95 %) |\n|---|---|")
    for label, each in zip(("amended ten times", "compiled once"), found, strict=True):
        k = each.kl_recovered
        print(f"| {label} | {k.value:.3f} ({k.low:.3f}–{k.high:.3f}) |")
    gap = found[1].kl_recovered.value - found[0].kl_recovered.value
    print(f"\nLost by amending: {gap:.3f} (the aim: at most 0.03)")


def _figures(report: dict[str, Any]) -> str:
    recovered = report["kl recovered on unseen references"]
    return f"{recovered:.3f} | {report['seconds']['total']:.1f}"


def blends(base: str, names: tuple[str, str], prompts: int, effort: str, folder: Path) -> None:
    """Two adapters together, and one compile of both manifestos, beside both as text."""
    model = open_base(base)
    both = replace(
        bundled()[names[0]],
        name="both",
        body="\n\n".join(bundled()[name].body for name in names),
    )
    settings = Settings.for_effort(effort)
    paths = [folder / f"{name}.gguf" for name in (*names, "both")]
    for manifesto, path in zip([*(bundled()[n] for n in names), both], paths, strict=True):
        compile_manifesto(manifesto, model, path, settings)
    one, two, whole = (read_adapter(path) for path in paths)
    adapters = {f"{names[0]} alone": one, f"{names[1]} alone": two, "both compiled": whole}
    for a, b in SCALES:
        path = folder / f"blend-{a:g}-{b:g}.gguf"
        blend([(one, a), (two, b)], path)
        adapters[f"{names[0]}:{a:g} {names[1]}:{b:g}"] = read_adapter(path)
    cut = folder / "cut.gguf"
    a, b = SCALES[1]
    report = blend([(one, a), (two, b)], cut, rank=one.rank)
    label = f"the blend of {a:g} and {b:g}, cut to rank {one.rank}"
    adapters[f"{label} (error {report['rank cut error']:.3f})"] = read_adapter(cut)
    llm = load(model, n_ctx=256)
    template = ChatTemplate(model.header)
    messages = unused_prompts(llm, model.header, [one, two, whole], prompts)
    student = encode(llm, template, None, messages).prefix
    columns = []
    everyone = list(adapters.values())
    for text in (both, *(bundled()[n] for n in names)):
        encoded = encode(llm, template, text.body, messages)
        target = Variant(encoded.prefix)
        said = replies(llm, target, [], encoded.rest, 24, stop_tokens(llm))
        alone = [tuple(float(i == j) for j in range(len(everyone))) for i in range(len(everyone))]
        kls = divergences(
            llm,
            Variant(encoded.prefix, (0.0,) * len(everyone)),
            [Variant(student, scales) for scales in ((0.0,) * len(everyone), *alone)],
            everyone,
            list(zip(encoded.rest, said, strict=True)),
        ).mean(axis=1)
        columns.append(1 - kls[1:] / kls[0])
    print(f"KL recovered on {len(messages)} messages that none was fitted on, system message:\n")
    print(f"| adapter | both manifestos | {names[0]} | {names[1]} |\n|---|---|---|---|")
    for label, *figures in zip(adapters, *columns, strict=True):
        print(f"| {label} | " + " | ".join(f"{value:.3f}" for value in figures) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["stages", "ten", "blend"])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--persona", default="steward")
    parser.add_argument("--with", dest="other", default="pirate", help="blended with the persona")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=24, help="0: ten does not evaluate")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--folder", type=Path, help="where adapters are left; temporary if not")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if options.part == "stages":
            stages(options.base, options.persona, options.saves)
        elif options.part == "ten":
            ten(options.base, options.persona, options.prompts, options.effort, folder)
        else:
            names = (options.persona, options.other)
            blends(options.base, names, options.prompts, options.effort, folder)


if __name__ == "__main__":
    main()

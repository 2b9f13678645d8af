"""The sessions bench: size, save and load against prefill; compaction; minds side by side.

Prints Markdown. Held-out prompts, llama.cpp on the quantized file. `--adapters` is a folder
with NAME-standard.gguf files, as benchmarks/ways.py leaves it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

import superego
from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters.compact import compact_session
from superego.dialogue import encode
from superego.evaluate import bundled as lines
from superego.evaluate import kl, log_softmax, recovered
from superego.logits import ParallelContext
from superego.manifesto import Manifesto
from superego.runtime import load, stop_tokens
from superego.session import open_session, prefix_of, save_session
from superego.state_file import State, layout, parse
from superego.template import ChatTemplate


def median(action: Callable[[], object], n: int = 5) -> float:
    """Median seconds of n runs."""
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sizes(model: BaseModel, folder: Path) -> None:
    """Manifestos of about 50, 500 and 3,000 tokens: bytes, save and load against prefill."""
    print("| tokens | file | bytes a token | prefill s | save s | load s | load / prefill |")
    print("|---|---|---|---|---|---|---|")
    llm = load(model, n_ctx=4096)
    template = ChatTemplate(model.header)
    words = " ".join(m.body for m in bundled().values()).split() * 4
    for wanted in (50, 500, 3000):
        n = wanted
        while len(prefix_of(llm, template, " ".join(words[:n]))) > wanted:
            n -= max(1, n // 50)
        manifesto = Manifesto(f"about {wanted}", " ".join(words[:n]))
        path = folder / f"{wanted}.session"
        report = save_session(llm, model, manifesto, path)
        tokens = prefix_of(llm, template, manifesto.body)

        def prefill(tokens: list[int] = tokens) -> None:
            llm.reset()
            llm._ctx.kv_cache_clear()
            llm.eval(tokens)

        read = median(prefill, 3)
        save = statistics.median(
            save_session(llm, model, manifesto, path)["save seconds"] for _ in range(3)
        )
        opened = median(lambda p=path: open_session(llm, model, p))
        print(
            f"| {len(tokens)} | {report['bytes'] / 1e6:.1f} MB | {report['bytes a token']:,} | "
            f"{read:.2f} | {save:.3f} | {opened:.3f} | {opened / read:.2f} |"
        )


def first_tokens(model: BaseModel, name: str, adapter: Path, folder: Path) -> None:
    """Time to first token and context tokens: prefill, session, compacted session, adapter."""
    llm = load(model, n_ctx=2048)
    template = ChatTemplate(model.header)
    body = bundled()[name].body
    path, short = folder / "full.session", folder / "short.session"
    save_session(llm, model, bundled()[name], path)
    cells = round(len(prefix_of(llm, template, body)) * 0.25)
    compact_session(llm, model, bundled()[name], short, cells)

    def timed(start: Callable[[], int], system: str | None) -> tuple[float, int]:
        seconds, used = [], []
        for message in lines("heldout")[:16]:
            encoded = encode(llm, template, system, [message])
            llm.reset()
            llm._ctx.kv_cache_clear()
            start_time = time.perf_counter()
            kept = start()
            front = llm.input_ids[:kept].tolist() if kept else encoded.prefix
            next(llm.generate(front + encoded.rest[0], temp=0.0))
            seconds.append(time.perf_counter() - start_time)
            used.append(len(front) + len(encoded.rest[0]))
        return statistics.median(seconds), round(statistics.median(used))

    def opened(file: Path) -> Callable[[], int]:
        return lambda: len(open_session(llm, model, file).tokens)

    rows = {
        "bare base": timed(lambda: 0, None),
        "system message, prefilled": timed(lambda: 0, body),
        "session, restored from disk each time": timed(opened(path), body),
        f"session of {cells} cells, restored each time": timed(opened(short), body),
    }
    with superego.attach(llm, adapter):
        rows["adapter"] = timed(lambda: 0, None)
    print(f"\n{name}:\n\n| way | time to first token | context tokens |\n|---|---|---|")
    for way, (seconds, used) in rows.items():
        print(f"| {way} | {seconds * 1000:.0f} ms | {used} |")


def curve(model: BaseModel, name: str, adapter: Path, folder: Path, prompts: list[str]) -> None:
    """KL recovered against cells kept, beside the adapter."""
    llm = load(model, n_ctx=1024)
    template = ChatTemplate(model.header)
    teacher = encode(llm, template, bundled()[name].body, prompts)
    student = encode(llm, template, None, prompts)
    widest = max(len(r) for e in (teacher, student) for r in e.rest) + 48
    stop = stop_tokens(llm)
    states: dict[str, State | None] = {"bare base": None}
    seconds: dict[str, float] = {}
    path = folder / f"{name}.session"
    for share in (1.0, 0.5, 0.25, 0.1):
        n = round(len(teacher.prefix) * share)
        if share == 1:
            save_session(llm, model, bundled()[name], path)
        else:
            done = compact_session(llm, model, bundled()[name], path, n)
            seconds[f"{n} cells"] = done["seconds"]
        states[f"{n} cells"] = parse(path.read_bytes(), layout(model.header, "f16"), path, 4096)
    checked = read_adapter(adapter)
    states["adapter"] = None
    found: dict[str, list[float]] = {way: [] for way in states}
    group = 16
    for start in range(0, len(prompts), group):
        part = slice(start, start + group)
        with ParallelContext(llm, teacher.prefix, group, widest) as context:
            replies, logits = context.greedy(teacher.rest[part], 48, stop)
        target = [log_softmax(x) for x in logits]
        for way, state in states.items():
            encoded = teacher if state else student
            pairs = [(checked, 1.0)] if way == "adapter" else []
            texts = [p + r[:-1] for p, r in zip(encoded.rest[part], replies, strict=True)]
            with ParallelContext(llm, encoded.prefix, group, widest, pairs, state) as context:
                read = context.read(texts, [len(p) - 1 for p in encoded.rest[part]])
            found[way] += [
                float(kl(want, log_softmax(mine)).mean())
                for mine, want in zip(read, target, strict=True)
            ]
    bare = np.array(found.pop("bare base"))
    for way, values in found.items():
        score = recovered(bare, np.array(values))
        spent = f"{seconds[way]:.0f}" if way in seconds else ""
        kept = way if way != "adapter" else f"adapter ({len(student.prefix)} cells of its own)"
        print(
            f"| {name} | {kept} | {score.value:.3f} ({score.low:.3f}–{score.high:.3f}) | {spent} |"
        )


def minds(model: BaseModel, adapters: list[Path]) -> None:
    """Memory of each further persona, and the time from one persona's reply to another's."""
    process = psutil.Process()
    llm = load(model, n_ctx=512)
    base = process.memory_info().rss
    with superego.Personas(llm) as personas:
        before = base
        print("\n| persona | memory, MB | of it the adapter file |\n|---|---|---|")
        for path in adapters:
            personas.add(path.stem, path, n_ctx=2048)
            list(personas.chat(path.stem).reply("Who are you?", max_tokens=8))
            now = process.memory_info().rss
            print(f"| {path.stem} | {(now - before) / 1e6:.0f} | {path.stat().st_size / 1e6:.0f} |")
            before = now
        names = list(personas)
        switch, read = [], []
        for turn in range(12):
            mind = personas[names[turn % len(names)]]
            had = mind.n_tokens
            start = time.perf_counter()
            chosen = personas[names[(turn + 1) % len(names)]]
            switch.append(time.perf_counter() - start)
            assert mind.n_tokens == had  # nothing was dropped, nothing has to be read again
            had = chosen.n_tokens
            list(personas.chat(names[(turn + 1) % len(names)]).reply("Go on.", max_tokens=2))
            read.append(chosen.n_tokens - had)
        print(
            f"\nswitch: {statistics.median(switch) * 1e6:.1f} µs; the base with its own context "
            f"takes {base / 1e6:.0f} MB in this process; tokens read after a switch: "
            f"{round(statistics.median(read))} (the new turn alone)"
        )


def main() -> None:
    """Runs every part; `--parts` narrows it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--adapters", type=Path, default=Path("bench"))
    parser.add_argument("--personas", nargs="+", default=["steward", "terse", "pirate"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument(
        "--parts", nargs="+", default=["sizes", "first", "minds", "curve"], help="what to run"
    )
    options = parser.parse_args()
    model = open_base(options.base)
    adapters = [options.adapters / f"{name}-standard.gguf" for name in options.personas]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "sizes" in options.parts:
            sizes(model, folder)
        if "first" in options.parts:
            first_tokens(model, options.personas[0], adapters[0], folder)
        if "minds" in options.parts:
            minds(model, adapters)
        if "curve" in options.parts:
            print("\n| persona | kept | KL recovered (95 %) | s to compact |\n|---|---|---|---|")
            for persona, adapter in zip(options.personas, adapters, strict=True):
                curve(model, persona, adapter, folder, lines("heldout")[: options.prompts])


if __name__ == "__main__":
    main()

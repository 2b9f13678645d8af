"""The comparison: every way to give a base a manifesto, on held-out prompts, in llama.cpp.

For each persona: bare base, system message, session, control vector, closed form at three
efforts, distillation at the wall time of each and at ten minutes, and closed form + refine. Every
adapter is made by the real command. Writes ways.json after each measurement and goes on from it,
so that it can be run in parts: what it holds a report of is not made again, be its file there or
not. Prints Markdown tables and draws two plots (PNG and SVG); with --docs the tables, plots and
figures replace those of the README and docs/ too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import superego
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.dialogue import encode
from superego.evaluate import Trace, evaluate, run_cost
from superego.evaluate import bundled as lines
from superego.machine import cpu
from superego.persona import read_persona
from superego.runtime import load
from superego.session import open_session, save_session
from superego.template import ChatTemplate

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

matplotlib.rcParams["svg.hashsalt"] = "superego"
SUPEREGO = str(Path(sys.executable).parent / "superego")
EFFORTS = ("quick", "standard", "thorough")
Results = dict[str, Any]
_DATELESS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}


def ways(refine: float, long: float) -> list[str]:
    """The ways that build a file, in the order in which they are made."""
    found = ["vector", *EFFORTS, *(f"distil as {e}" for e in EFFORTS)]
    return [*found, f"standard + refine {refine:g} min", f"distil {long:g} min"]


def command(way: str, name: str, out: Path, made: dict[str, Any], base: str) -> list[str]:
    """The command line that builds a way's file."""
    end = ["--base", base, "-o", str(out / f"{name}-{way.replace(' ', '-')}.gguf"), "--json"]
    if way in EFFORTS:
        return ["compile", name, *end, "--effort", way, "--no-cache"]
    if way == "vector":
        return ["vector", name, *end]
    if "refine" in way:
        return ["refine", str(out / f"{name}-standard.gguf"), *end, "--minutes", way.split()[-2]]
    like = way.removeprefix("distil as ")
    minutes = made[like]["seconds"] / 60 if like in EFFORTS else float(way.split()[-2])
    return ["distill", name, *end, "--minutes", f"{minutes:.4g}"]


def build(way: str, name: str, out: Path, made: dict[str, Any], base: str) -> dict[str, Any]:
    """Run the command: file, seconds of the whole command, peak memory of its process in MB."""
    words = command(way, name, out, made, base)
    start = time.perf_counter()
    # a cache of its own, emptied for each: what one way has written is no gift to the next
    cache = out / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    done = subprocess.run(
        [SUPEREGO, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    report = json.loads(done.stdout)
    path = Path(report.get("adapter") or report.get("vector") or words[words.index("-o") + 1])
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 1),
        "peak memory MB": report.get("peak memory MB"),
        "date": date.today().isoformat(),
        "machine": machine(),
        "report": report,
    }


def measure(
    model: BaseModel, name: str, files: dict[str, Path], other: Path, prompts: list[str]
) -> dict[str, Any]:
    """The measures of all ways' files at once, and KL recovered by token position."""
    trace = Trace()
    personas = [(read_persona(path), 1.0) for path in files.values()]
    reports = evaluate(
        model,
        bundled()[name].body,
        personas,
        prompts,
        foreign=(read_persona(other), 1.0),
        trace=trace,
    )
    found: dict[str, Any] = {}
    for i, (way, report) in enumerate(zip(files, reports, strict=True)):
        found[way] = report.as_dict()
        found[way]["by token"] = by_token(trace.kl["0", -1], trace.kl["S", i])
    return found


def by_token(bare: list[np.ndarray], own: list[np.ndarray]) -> list[float]:
    """KL recovered at each token position, over the replies that reach it."""
    found = []
    for i in range(max(map(len, bare))):
        rest = [(float(b[i]), float(s[i])) for b, s in zip(bare, own, strict=True) if len(b) > i]
        if len(rest) < 6:
            break
        found.append(round(1 - sum(s for _, s in rest) / max(sum(b for b, _ in rest), 1e-9), 4))
    return found


def costs(
    model: BaseModel, name: str, files: dict[str, Path], prompts: list[str], out: Path
) -> dict[str, Any]:
    """Prompt tokens, time to first token and decode speed of every way, on one live model."""
    llm, template = load(model, n_ctx=2048), ChatTemplate(model.header)
    body = bundled()[name].body
    run_cost(llm, template, None, prompts[:2])
    found = {
        "bare base": vars(run_cost(llm, template, None, prompts)),
        "system message": vars(run_cost(llm, template, body, prompts)),
    }
    path = out / f"{name}.session"
    start = time.perf_counter()
    save_session(llm, model, bundled()[name], path)
    seconds, size = time.perf_counter() - start, path.stat().st_size
    firsts = []
    for message in prompts:
        rest = encode(llm, template, body, [message]).rest[0]
        llm.reset()
        llm._ctx.kv_cache_clear()
        start = time.perf_counter()
        session = open_session(llm, model, path)
        next(llm.generate([*session.tokens, *rest], temp=0.0))
        firsts.append(time.perf_counter() - start)
    found["session"] = {
        **found["system message"],
        "first_token_seconds": statistics.median(firsts),
        "seconds": round(seconds, 2),
        "bytes": size,
    }
    for way, file in files.items():
        with superego.attach(llm, file) if file else nullcontext():
            found[way] = vars(run_cost(llm, template, None, prompts))
    return found


def table(results: Results) -> str:
    """One row a way: means over the personas that have it, lowest in brackets."""
    personas = results["personas"]
    order = ["bare base", "system message", "session", *results["ways"]]
    head = (
        "| way | personas | KL recovered: mean (lowest) | mean 95 % interval | top-1 | drift | "
        "specificity | KL way + system | build s | peak MB | prompt tokens | first token ms | "
        "tokens/s | file MB |\n|---" + "|---" * 13 + "|\n"
    )
    rows = ""
    for way in order:
        measured = [p for p in personas.values() if p.get("reports")]
        having = [p for p in measured if way in p.get("costs", {})]
        if not having:
            continue

        def mean(*keys: str, p: list[Any] = having) -> float | None:
            return _mean(p, keys)

        any_ = [next(iter(p["reports"].values())) for p in having]
        if way in results["ways"]:
            own = [p["reports"][way] for p in having]
            k = [r["kl_recovered"] for r in own]
            cells = [
                f"{statistics.mean(x['value'] for x in k):.3f} ({min(x['value'] for x in k):.3f})",
                f"{statistics.mean(x['low'] for x in k):.3f}–"
                f"{statistics.mean(x['high'] for x in k):.3f}",
                f"{statistics.mean(r['top1_adapter'] for r in own):.3f}",
                f"{statistics.mean(r['drift_adapter'] for r in own):.3f}",
                f"{statistics.mean(r['specificity'] for r in own):.2f}",
                f"{statistics.mean(r['kl_with_system'] for r in own):.3f}",
                _number(mean("made", way, "seconds")),
                _number(mean("made", way, "peak memory MB")),
            ]
            size = mean("made", way, "bytes")
        else:
            bare = way == "bare base"
            top = statistics.mean(r["top1_base"] for r in any_) if bare else 1
            drift = 0 if bare else statistics.mean(r["drift_system"] for r in any_)
            said = {"bare base": "0, by definition", "session": "as the system message"}
            cells = [said.get(way, "1, by definition"), "", f"{top:.3f}", f"{drift:.3f}"]
            cells += ["", "", _number(mean("costs", way, "seconds")), ""]
            size = mean("costs", way, "bytes")
        first = mean("costs", way, "first_token_seconds")
        cells += [
            _number(mean("costs", way, "prompt_tokens")),
            _number(first * 1000 if first else None),
            _number(mean("costs", way, "tokens_per_second")),
            "" if size is None else f"{size / 1e6:.1f}",
        ]
        rows += f"| {way} | {len(having)} | " + " | ".join(cells) + " |\n"
    failed = [
        f"- {name}, {way}: {made['failed']}\n"
        for name, p in personas.items()
        for way, made in p["made"].items()
        if "failed" in made
    ]
    return head + rows + ("\nNot made:\n" + "".join(failed) if failed else "")


def by_persona(results: Results) -> str:
    """KL recovered and build seconds, a row each persona."""
    names = [n for n, p in results["personas"].items() if p.get("reports")]
    found = [
        w for w in results["ways"] if any(w in results["personas"][n]["reports"] for n in names)
    ]
    rows = ""
    for name in names:
        persona = results["personas"][name]
        rows += f"| {name} |"
        for way in found:
            rows += f" {_cell(persona, way)} |"
        rows += "\n"
    head = "| KL recovered (95 %), drift, build | " + " | ".join(found) + " |\n"
    return head + "|---" * (len(found) + 1) + "|\n" + rows


def details(results: Results) -> str:
    """Every measure of the closed form's efforts, a row each, and their means."""
    rows, means = "", ""
    for name, persona in results["personas"].items():
        for effort in EFFORTS:
            if effort not in persona.get("reports", {}):
                continue
            r, made = persona["reports"][effort], persona["made"][effort]
            k, seconds = r["kl_recovered"], made["report"]["seconds"]
            rows += (
                f"| {name} | {effort} | {k['value']:.3f} ({k['low']:.3f}–{k['high']:.3f}) "
                f"| {r['top1_adapter']:.3f} ({r['top1_base']:.3f}) "
                f"| {r['drift_adapter']:.3f} ({r['drift_system']:.3f}) | {r['specificity']:.2f} "
                f"| {r['kl_with_system']:.3f} | {seconds['references']:.0f} / "
                f"{seconds['fit']:.0f} / {made['seconds']:.0f} | {made['peak memory MB']} "
                f"| {made['bytes'] / 1e6:.0f} |\n"
            )
    for effort in EFFORTS:
        having = [
            (p["reports"][effort]["kl_recovered"]["value"], p["made"][effort]["seconds"])
            for p in results["personas"].values()
            if effort in p.get("reports", {})
        ]
        if having:
            values, times = zip(*having, strict=True)
            means += (
                f"{effort}: {len(values)} personas, mean KL recovered "
                f"{statistics.mean(values):.3f}, lowest {min(values):.3f}; seconds "
                f"{min(times):.0f} to {max(times):.0f}, median {statistics.median(times):.0f}\n"
            )
    head = (
        "| persona | effort | KL recovered (95 %) | top-1 (bare) | drift (system) | specificity | "
        "KL adapter + system | seconds: references / fit / whole | MB | adapter MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return f"{head}{rows}\n{means}"


def refined(results: Results) -> str:
    """What refine has over the `standard` that it began with, a row each persona, and in all."""
    way = next((w for w in results["ways"] if "refine" in w), "")
    rows, values, gains, times = "", [], [], []
    for name, persona in results["personas"].items():
        reports = persona.get("reports", {})
        if way not in reports or "standard" not in reports:
            continue
        r, made = reports[way], persona["made"][way]
        k, start = r["kl_recovered"], reports["standard"]["kl_recovered"]["value"]
        fitted = made["report"].get("fitted to", ["-"])
        values.append(k["value"])
        gains.append(k["value"] - start)
        times.append(made["seconds"])
        rows += (
            f"| {name} | {start:.3f} | {k['value']:.3f} ({k['low']:.3f}–{k['high']:.3f}) "
            f"| {gains[-1]:+.3f} | {r['top1_adapter']:.3f} | {r['drift_adapter']:.3f} "
            f"| {r['kl_with_system']:.3f} | {', '.join(map(str, fitted))} "
            f"| {made['seconds']:.0f} | {made['peak memory MB']} |\n"
        )
    head = (
        f"| persona | standard | {way} (95 %) | gain | top-1 | drift | KL way + system | "
        "references, first and last layer | seconds | MB |\n" + "|---" * 10 + "|\n"
    )
    if not values:
        return head
    return (
        f"{head}{rows}\n{way}: {len(values)} personas, mean KL recovered "
        f"{statistics.mean(values):.4f}, lowest {min(values):.3f}; gains {min(gains):+.4f} to "
        f"{max(gains):+.4f}; seconds {min(times):.0f} to {max(times):.0f}\n"
    )


def _cell(persona: dict[str, Any], way: str) -> str:
    """KL recovered with its interval, drift, seconds; empty where it was not measured."""
    report = persona["reports"].get(way)
    if report is None:
        return ""
    k, drift = report["kl_recovered"], report["drift_adapter"]
    seconds = persona["made"][way]["seconds"]
    return f"{k['value']:.3f} ({k['low']:.3f}–{k['high']:.3f}), {drift:.3f}, {seconds:.0f} s"


def origin(results: Results) -> str:
    """When and on what machine each way was made, a line for each such pair."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for way in results["ways"]:
        for name, persona in results["personas"].items():
            made = persona["made"].get(way, {})
            if way in persona.get("reports", {}):
                when = made.get("date", results["date"]), made.get("machine", results["machine"])
                found.setdefault(when, {}).setdefault(way, []).append(name)
    measured = sum(bool(p.get("reports")) for p in results["personas"].values())
    text = ""
    for (day, where), made_ways in sorted(found.items()):
        words = [
            way if len(names) == measured else f"{way} ({', '.join(names)})"
            for way, names in made_ways.items()
        ]
        text += f"- {day}, {where}: {', '.join(words)}\n"
    return text


def write_docs(results: Results, out: Path, root: Path) -> None:
    """Replace what stands between the marks of a table in the documents; copy plots and figures.

    A mark is `<!-- ways: NAME -->`, and `<!-- /ways -->` ends what it begins.
    """
    tables = {
        "means": table,
        "personas": by_persona,
        "details": details,
        "refined": refined,
        "origin": origin,
    }
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        new = re.sub(
            r"(<!-- ways: (\w+) -->\n).*?(<!-- /ways -->)",
            lambda m: f"{m[1]}\n{tables[m[2]](results).strip()}\n\n{m[3]}",
            text,
            flags=re.DOTALL,
        )
        if new != text:
            path.write_text(new, "utf-8")
    target = root / "docs/ways"
    if out.resolve() != target.resolve():
        for name in ("seconds.png", "seconds.svg", "tokens.png", "tokens.svg"):
            shutil.copy(out / name, target / name)
        figures = (out / "ways.json").read_text("utf-8")
        # where this machine keeps its files is nobody's business
        figures = re.sub(r'"(/[^"]*/)([^"/]+)"', r'"\2"', figures)
        (target / "ways.json").write_text(figures, "utf-8")


def _mean(personas: list[dict[str, Any]], keys: Sequence[str]) -> float | None:
    """The mean of what lies under these keys, where it is there."""
    found = []
    for value in personas:
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            found.append(value)
    return statistics.mean(found) if found else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def plots(results: Results, out: Path) -> None:
    """KL recovered against build seconds, and by token position."""
    personas = results["personas"].values()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for way in results["ways"]:
        points = [
            (p["made"][way]["seconds"], p["reports"][way]["kl_recovered"]["value"])
            for p in personas
            if way in p.get("reports", {})
        ]
        if points:
            x, y = zip(*points, strict=True)
            dots = axes.scatter(x, y, s=10, alpha=0.4)
            axes.scatter(
                [statistics.mean(x)],
                [statistics.mean(y)],
                s=60,
                label=way,
                color=dots.get_facecolor(),
            )
    axes.set(xscale="log", xlabel="seconds to build, whole command", ylabel="KL recovered")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 6)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)
    _save(figure, out / "seconds")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for way in results["ways"]:
        curves = [p["reports"][way]["by token"] for p in personas if way in p.get("reports", {})]
        if curves:
            n = min(map(len, curves))
            axes.plot(range(1, n + 1), np.mean([c[:n] for c in curves], axis=0), label=way)
    axes.set(xlabel="token of the reply", ylabel="KL recovered", ylim=(0, 1.02))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, out / "tokens")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    for kind in ("png", "svg"):
        # no date, and the same names inside: the same figures are the same file
        figure.savefig(path.with_suffix(f".{kind}"), dpi=120, metadata=_DATELESS[kind])
    plt.close(figure)


def machine() -> str:
    """Processor, cores and the features that decide the speed, in words."""
    found = cpu()
    known = found["features"] or []  # None where the system does not say
    wide = [f for f in ("AVX2", "AVX512", "AVX512_BF16", "AMX_INT8", "NEON") if f in known]
    return f"{found['name']}, {found['cores']} cores, {', '.join(wide)}"


def main() -> None:
    """Builds and measures; `--personas`, `--skip` and the minutes narrow it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--personas", nargs="+", default=list(bundled()))
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out")
    parser.add_argument("--refine", type=float, default=5, help="minutes")
    parser.add_argument("--long", type=float, default=10, help="minutes of the long distillation")
    parser.add_argument("--prompts", type=int, default=24, help="how many held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--docs", action="store_true", help="write them into README.md and docs/")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ways.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {"personas": {}}
    chosen = [w for w in ways(options.refine, options.long) if w not in options.skip]
    if not options.show:
        results.update(date=date.today().isoformat(), machine=machine())
    known = {*results.get("ways", []), *chosen}
    order = ways(options.refine, options.long)
    results["ways"] = [w for w in order if w in known] + sorted(known - set(order))
    prompts = lines("heldout")[: options.prompts]
    model = open_base(options.base)

    def kept() -> None:
        path.write_text(json.dumps(results, indent=1))

    # another persona's adapter, for specificity: the one before in the list of all
    everyone = list(bundled())
    before = {name: everyone[i - 1] for i, name in enumerate(everyone)}
    for name in [] if options.show else options.personas:
        persona = results["personas"].setdefault(name, {"made": {}})
        made = persona["made"]
        reports = persona.setdefault("reports", {})
        for way in chosen:
            if way in reports or (out / made.get(way, {}).get("file", "?")).exists():
                continue
            if "refine" in way and not (out / f"{name}-standard.gguf").exists():
                build("standard", name, out, made, options.base)  # measured elsewhere
            made[way] = build(way, name, out, made, options.base)
            print(name, way, made[way].get("seconds"), made[way].get("failed", ""), flush=True)
            kept()
        lacking = {
            w: out / made[w]["file"] for w in chosen if w not in reports and "file" in made[w]
        }
        if lacking:
            other = out / f"{before[name]}-quick.gguf"
            if not other.exists():
                other_made = results["personas"].setdefault(before[name], {"made": {}})["made"]
                built = build("quick", before[name], out, other_made, options.base)
                other_made.setdefault("quick", built)
            reports.update(measure(model, name, lacking, other, prompts))
            costed = costs(model, name, lacking, prompts[:8], out)
            persona.setdefault("costs", {}).update(costed)
            kept()
        for way in lacking:
            print(name, way, reports[way]["kl_recovered"], flush=True)
    print(origin(results))
    print(table(results))
    print(by_persona(results))
    print(details(results))
    print(refined(results))
    plots(results, out)
    if options.docs:
        write_docs(results, out, Path(__file__).parent.parent)


if __name__ == "__main__":
    main()

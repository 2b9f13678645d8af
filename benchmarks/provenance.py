"""Which of two conflicting documents is followed: the newer, the better, or neither.

60 invented pairs (provenance.jsonl) in both orders. Results go to bench/provenance.json after
each condition; the Markdown table is printed from what is there. `--pairs dev` takes the 12
pairs on which wordings may be tried; the published 60 are for measuring alone.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from superego.adapter import read_adapter
from superego.base import open_base
from superego.bundled import bundled
from superego.dialogue import encode
from superego.evaluate import log_softmax
from superego.logits import ParallelContext
from superego.provenance import Document, in_front
from superego.runtime import load, stop_tokens, tokenize
from superego.template import ChatTemplate

HERE = Path(__file__).parent
CONDITIONS = {
    "control": "no documents, bare base",
    "untagged": "untagged, bare base",
    "tagged": "tagged, bare base",
    "system": "tagged, persona as system message",
    "adapter": "tagged, compiled persona",
}
GROUP = 8  # prompts read at once
REPLY = 40  # tokens


def question(pair: dict[str, Any], condition: str, better_first: bool) -> str:
    """The user turn."""
    if condition == "control":
        return f"Question: {pair['question']}"
    both = [pair["better"], pair["worse"]] if better_first else [pair["worse"], pair["better"]]
    if condition == "untagged":
        bodies = [
            f"[Document {i}]\n{each['body']}\n[End of document {i}]"
            for i, each in enumerate(both, 1)
        ]
        return "\n\n".join([*bodies, f"Question: {pair['question']}"])
    documents = [Document(e["body"], e["source"], e["kind"], e["date"]) for e in both]
    return in_front(documents, pair["question"])


def said(reply: str, answer: str) -> bool:
    """Whether the reply holds the answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) is not None


def measure(
    base: str, condition: str, adapter: Path, pairs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each pair and order: both answers' log-likelihoods a token, and the reply."""
    model = open_base(base)
    llm, template = load(model, n_ctx=256), ChatTemplate(model.header)
    system = bundled()["epistemics"].body if condition == "system" else None
    attached = [(read_adapter(adapter), 1.0)] if condition == "adapter" else []
    items = [(pair, first) for pair in pairs for first in (True, False)]
    if condition == "control":
        items = items[::2]  # without documents there is no order
    encoded = encode(llm, template, system, [question(p, condition, f) for p, f in items])
    stop, rows = stop_tokens(llm), []
    widest = max(map(len, encoded.rest)) + REPLY + 32
    with ParallelContext(llm, encoded.prefix, GROUP, widest, attached) as context:
        for start in range(0, len(items), GROUP):
            part, prompts = items[start : start + GROUP], encoded.rest[start : start + GROUP]
            replies, _ = context.greedy(prompts, REPLY, stop)
            means: dict[str, list[float]] = {}
            for which in ("better", "worse"):
                stems = [tokenize(llm, pair["stem"]) for pair, _ in part]
                ends = [tokenize(llm, " " + pair[which]["answer"]) for pair, _ in part]
                texts = [(stem + end)[:-1] for stem, end in zip(stems, ends, strict=True)]
                logits = context.instead(prompts, texts, [len(stem) - 1 for stem in stems])
                means[which] = [
                    float(log_softmax(x)[np.arange(len(end)), end].mean())
                    for x, end in zip(logits, ends, strict=True)
                ]
            for i, (pair, first) in enumerate(part):
                reply = [t for t in replies[i] if t not in stop]
                text = llm.detokenize(reply).decode("utf-8", "replace")
                rows.append(
                    {
                        "id": pair["id"],
                        "axis": pair["axis"],
                        "better_first": first,
                        "better": means["better"][i],
                        "worse": means["worse"][i],
                        "reply": text,
                        "says_better": said(text, pair["better"]["answer"]),
                        "says_worse": said(text, pair["worse"]["answer"]),
                    }
                )
    return rows


def interval(values: dict[str, list[float]]) -> str:
    """Mean in per cent with a 95 % bootstrap interval over pairs (not over orders)."""
    means = np.array([np.mean(v) for v in values.values()])
    draws = np.random.default_rng(0).integers(0, len(means), (4000, len(means)))
    low, high = np.percentile(100 * means[draws].mean(axis=1), [2.5, 97.5])
    return f"{100 * means.mean():.0f} ({low:.0f}–{high:.0f})"


def by_pair(rows: list[dict[str, Any]], value: Any) -> dict[str, list[float]]:
    """Values of the rows of each pair."""
    out: dict[str, list[float]] = {}
    for row in rows:
        out.setdefault(row["id"], []).append(float(value(row)))
    return out


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The Markdown table; shares in per cent."""
    lines = [
        "| condition | followed, by likelihood: all | newer | paper | better first / last "
        "| replies: better alone | worse alone | both | neither |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def follows(row: dict[str, Any]) -> bool:
        return row["better"] > row["worse"]

    for condition, name in CONDITIONS.items():
        rows = results.get(condition)
        if not rows:
            continue
        cells = [interval(by_pair(rows, follows))]
        for axis in ("date", "kind"):
            cells.append(interval(by_pair([r for r in rows if r["axis"] == axis], follows)))
        orders = [[r for r in rows if r["better_first"] is first] for first in (True, False)]
        shares = [100 * np.mean([follows(r) for r in part]) if part else None for part in orders]
        cells.append(" / ".join(f"{s:.0f}" for s in shares) if all(orders) else "")
        for better, worse in ((True, False), (False, True), (True, True), (False, False)):
            hit = [(r["says_better"], r["says_worse"]) == (better, worse) for r in rows]
            cells.append(f"{100 * np.mean(hit):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures the conditions named, then prints the table of all there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--pairs", choices=["published", "dev"], default="published")
    parser.add_argument("--conditions", nargs="*", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--adapter", type=Path, default=Path("bench/epistemics-standard.gguf"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = "provenance" if options.pairs == "published" else "provenance-dev"
    out = options.out or Path("bench") / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    pairs = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines()]
    results = json.loads(out.read_text("utf-8")) if out.exists() else {}
    for condition in options.conditions:
        start = time.perf_counter()
        results[condition] = measure(options.base, condition, options.adapter, pairs)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
        print(f"{condition}: {time.perf_counter() - start:.0f} s", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

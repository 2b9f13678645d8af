"""Which of two conflicting documents is followed: the newer, the better, or neither.

60 invented pairs (provenance.jsonl), each in both orders and, where there are headers, in one of
them also with the two headers exchanged. Results go to bench/provenance.json after each
condition; the Markdown tables are printed from what is there. `--pairs dev` takes 12 other pairs,
on which `--form` tries other wordings of the user's turn; the published 60 are for measuring
alone.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
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
Row = dict[str, Any]


def _framed(blocks: Sequence[str], asked: str) -> str:
    bodies = [f"[Document {i}]\n{b}\n[End of document {i}]" for i, b in enumerate(blocks, 1)]
    return "\n\n".join([*bodies, f"Question: {asked}"])


def _header_last(documents: Sequence[Document], asked: str) -> str:
    return _framed([f"{d.body}\n{d.header.strip()}" for d in documents], asked)


def _sentence(documents: Sequence[Document], asked: str) -> str:
    blocks = [f"The {d.source} ({d.kind}) wrote in {d.date}: {d.body}" for d in documents]
    return _framed(blocks, asked)


def _advice(documents: Sequence[Document], asked: str) -> str:
    advice = "The documents disagree. Follow the newer one, or the better kind of source."
    return in_front(documents, f"{asked} {advice}")


# `documented` is what `superego chat --document` writes
FORMS: dict[str, Callable[[Sequence[Document], str], str]] = {
    "documented": in_front,
    "header-last": _header_last,
    "sentence": _sentence,
    "advice": _advice,
}


def turn(pair: Row, condition: str, form: str, better_first: bool, exchanged: bool) -> str:
    """The user's turn; `exchanged` gives each of the two bodies the other's header."""
    if condition == "control":
        return f"Question: {pair['question']}"
    better, worse = pair["better"], pair["worse"]
    heads = (worse, better) if exchanged else (better, worse)
    both = [
        Document(text["body"], head["source"], head["kind"], head["date"])
        for text, head in zip((better, worse), heads, strict=True)
    ]
    both = both if better_first else both[::-1]
    if condition == "untagged":
        return _framed([each.body for each in both], pair["question"])
    return FORMS[form](both, pair["question"])


def said(reply: str, answer: str) -> bool:
    """Whether the reply holds the answer as whole words; names keep their case (May, may)."""
    answer = answer.removeprefix("the ")
    flags = re.IGNORECASE if answer.islower() else 0
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, flags) is not None


def measure(base: str, condition: str, form: str, adapter: Path, pairs: Sequence[Row]) -> list[Row]:
    """A row for each pair and order, and one with the headers exchanged.

    Each has the mean log-likelihood a token of both answers behind the same beginning of a reply
    (a mean: answers have one to five tokens, and a sum would prefer the shorter), and the model's
    own greedy reply.
    """
    model = open_base(base)
    llm, template = load(model, n_ctx=256), ChatTemplate(model.header)
    system = bundled()["epistemics"].body if condition == "system" else None
    attached = [(read_adapter(adapter), 1.0)] if condition == "adapter" else []
    orders = (True,) if condition == "control" else (True, False)
    items = [(pair, first, False) for pair in pairs for first in orders]
    written = len(items)
    if condition not in ("control", "untagged"):
        # in one order, every second pair in the other: the bodies' order is the same in both
        items += [(pair, i % 2 == 0, True) for i, pair in enumerate(pairs)]
    encoded = encode(llm, template, system, [turn(p, condition, form, f, e) for p, f, e in items])
    stop, rows = stop_tokens(llm), []
    widest = max(map(len, encoded.rest)) + REPLY + 32
    with ParallelContext(llm, encoded.prefix, GROUP, widest, attached) as context:
        starts = [*range(0, written, GROUP), *range(written, len(items), GROUP)]
        for start, end in zip(starts, [*starts[1:], len(items)], strict=True):
            part, prompts = items[start:end], encoded.rest[start:end]
            # a reply is read where the headers are as written; elsewhere the prompt alone
            replies, _ = context.greedy(prompts, REPLY if start < written else 1, stop)
            means: dict[str, list[float]] = {}
            for which in ("better", "worse"):
                stems = [tokenize(llm, pair["stem"]) for pair, *_ in part]
                ends = [tokenize(llm, " " + pair[which]["answer"]) for pair, *_ in part]
                texts = [(stem + end)[:-1] for stem, end in zip(stems, ends, strict=True)]
                logits = context.instead(prompts, texts, [len(stem) - 1 for stem in stems])
                means[which] = [
                    float(log_softmax(x)[np.arange(len(end)), end].mean())
                    for x, end in zip(logits, ends, strict=True)
                ]
            for i, (pair, first, exchanged) in enumerate(part):
                text = llm.detokenize([t for t in replies[i] if t not in stop])
                reply = text.decode("utf-8", "replace")
                rows.append(
                    {
                        "id": pair["id"],
                        "axis": pair["axis"],
                        "better_first": first,
                        "exchanged": exchanged,
                        "better": means["better"][i],
                        "worse": means["worse"][i],
                        "reply": reply if not exchanged else "",
                        "says_better": said(reply, pair["better"]["answer"]),
                        "says_worse": said(reply, pair["worse"]["answer"]),
                    }
                )
    return rows


def interval(rows: Sequence[Row], value: Callable[[Row], float], digits: int = 0) -> str:
    """Mean of a value of the rows, with a 95 % bootstrap interval over pairs (not over rows)."""
    by_pair: dict[str, list[float]] = {}
    for row in rows:
        by_pair.setdefault(row["id"], []).append(float(value(row)))
    means = np.array([np.mean(v) for v in by_pair.values()])
    draws = np.random.default_rng(0).integers(0, len(means), (4000, len(means)))
    low, high = np.percentile(means[draws].mean(axis=1), [2.5, 97.5])
    return f"{means.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def follows(row: Row) -> float:
    """100 where the better document's answer is the likelier one."""
    return 100.0 * (row["better"] > row["worse"])


def obeys(row: Row) -> float:
    """100 where the answer under the better header is the likelier one."""
    return 100.0 * ((row["better"] > row["worse"]) is not row["exchanged"])


def pull(row: Row) -> float:
    """Nats a token for the answer under the better header."""
    return (row["better"] - row["worse"]) * (-1 if row["exchanged"] else 1)


def tables(results: dict[str, list[Row]]) -> str:
    """The Markdown tables; shares in per cent."""
    likely = [
        "| condition | all | newer over older | paper over forum | better first | better last "
        "| header alone | header's pull, nats a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    replies = [
        "| condition | better alone | worse alone | both | neither |",
        "|---|---|---|---|---|",
    ]
    for condition, name in CONDITIONS.items():
        rows = results.get(condition)
        if not rows:
            continue
        as_written = [row for row in rows if not row["exchanged"]]
        cells = [interval(as_written, follows)]
        for axis in ("date", "kind"):
            cells.append(interval([r for r in as_written if r["axis"] == axis], follows))
        for first in (True, False):
            part = [row for row in as_written if row["better_first"] is first]
            cells.append(interval(part, follows) if condition != "control" else "")
        order = {row["id"]: row["better_first"] for row in rows if row["exchanged"]}
        both = [row for row in rows if row["better_first"] is order.get(row["id"])]
        cells += [interval(both, obeys), interval(both, pull, 2)] if both else ["", ""]
        likely.append(f"| {name} | " + " | ".join(cells) + " |")
        cells = []
        for wanted in ((True, False), (False, True), (True, True), (False, False)):
            hit = [(r["says_better"], r["says_worse"]) == wanted for r in as_written]
            cells.append(f"{100 * np.mean(hit):.0f}")
        replies.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*likely, "", *replies])


def main() -> None:
    """Measures the conditions named, then prints the tables of all there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--pairs", choices=["published", "dev"], default="published")
    parser.add_argument("--conditions", nargs="*", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--form", choices=FORMS, default="documented", help="with --pairs dev")
    parser.add_argument("--adapter", type=Path, default=Path("bench/epistemics-standard.gguf"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.form != "documented" and options.pairs != "dev":
        parser.error("--form is for --pairs dev: nothing is tried on the published pairs")
    name = "provenance" if options.pairs == "published" else "provenance-dev"
    suffix = "" if options.form == "documented" else f"-{options.form}"
    out = options.out or Path("bench") / f"{name}{suffix}.json"
    out.parent.mkdir(exist_ok=True)
    pairs = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines()]
    results = json.loads(out.read_text("utf-8")) if out.exists() else {}
    for condition in options.conditions:
        start = time.perf_counter()
        results[condition] = measure(options.base, condition, options.form, options.adapter, pairs)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
        print(f"{condition}: {time.perf_counter() - start:.0f} s", flush=True)
    print(tables(results))


if __name__ == "__main__":
    main()

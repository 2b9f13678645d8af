"""What an activated LoRA costs: KL recovered beside the plain adapter, in llama.cpp.

Prints Markdown. The base reads the prompt up to the reply's header without the adapter, the
header and the reply with it, as llama-server runs an activated LoRA. Held-out prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from superego.adapter import read_adapter
from superego.alora import invocation_tokens
from superego.base import open_base
from superego.dialogue import encode
from superego.evaluate import bundled as lines
from superego.evaluate import kl, log_softmax, recovered
from superego.logits import ParallelContext
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

GROUP = 8
EARLY = 1  # llama-server begins to apply it one token before the invocation tokens


def main() -> None:
    """One row a persona and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    model = open_base(options.base)
    llm = load(model, n_ctx=256)
    template, stop = ChatTemplate(model.header), stop_tokens(llm)
    header = invocation_tokens(llm, template)
    prompts = lines("heldout")[: options.prompts]
    student = encode(llm, template, None, prompts)
    print("| persona | way | KL recovered (95 %) |\n|---|---|---|")
    for path in options.adapters:
        adapter = read_adapter(path)
        teacher = encode(llm, template, str(adapter.own["manifesto"]), prompts)
        widest = max(len(r) for e in (teacher, student) for r in e.rest) + 48
        ways = {("bare base", 0.0), *((w, s) for s in options.scales for w in ("plain", "alora"))}
        found: dict[tuple[str, float], list[float]] = {way: [] for way in sorted(ways)}
        with (
            ParallelContext(llm, teacher.prefix, GROUP, widest) as asked,
            ParallelContext(llm, student.prefix, GROUP, widest, [(adapter, 0.0)]) as context,
        ):
            for start in range(0, len(prompts), GROUP):
                part = slice(start, start + GROUP)
                replies, logits = asked.greedy(teacher.rest[part], 48, stop)
                target = [log_softmax(x) for x in logits]
                rest = student.rest[part]
                texts = [p + r[:-1] for p, r in zip(rest, replies, strict=True)]
                first = [len(p) - 1 for p in rest]
                begin = [len(p) - len(header) - EARLY for p in rest]
                for way, scale in found:
                    context.set_scales([scale if way == "plain" else 0.0])
                    switch = (begin, [scale]) if way == "alora" else None
                    read = context.read(texts, first, switch)
                    found[way, scale] += [
                        float(kl(want, log_softmax(mine)).mean())
                        for mine, want in zip(read, target, strict=True)
                    ]
        bare = np.array(found.pop(("bare base", 0.0)))
        for (way, scale), values in found.items():
            score = recovered(bare, np.array(values))
            at = "" if scale == 1 else f" at {scale:g}"
            print(
                f"| {path.stem} | {way}{at} | {score.value:.3f} "
                f"({score.low:.3f}–{score.high:.3f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

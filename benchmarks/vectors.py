"""What control vectors recover beside the system message, on held-out prompts in llama.cpp.

Prints Markdown, one row a persona. The scale is tuned on unseen references; held-out prompts are
only measured on. `--variants` prints, on unseen references in torch, what other ways of making a
vector recover: what docs/vectors.md chose from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.control_vector import read_vector
from superego.converters import vector
from superego.converters.compile import Settings, open_for_compile
from superego.converters.references import prepare, seeds, write_replies
from superego.converters.streams import Pack, mean_kl, predictions
from superego.evaluate import bundled as lines
from superego.evaluate import evaluate
from superego.progress import Steps
from superego.runtime import load

SHARES = {  # of what is lacking, fed back; the scales tried
    0.0001: (0.08, 0.12, 0.16, 0.2, 0.25),
    0.2: (0.75, 1.0, 1.25, 1.5, 2.0),
    0.4: (0.75, 1.0, 1.25, 1.5),
    0.6: (0.75, 1.0, 1.25),
    1.0: (0.5, 0.75, 1.0, 1.25),
}


def measured(model: BaseModel, name: str, effort: str, n_prompts: int, folder: Path) -> str:
    """A table's row."""
    path = folder / f"{name}.gguf"
    settings = Settings.for_effort(effort)
    made = vector.make_vector(bundled()[name], model, path, settings)
    prompts = lines("heldout")[:n_prompts]
    (r,) = evaluate(model, bundled()[name].body, [(read_vector(path), 1.0)], prompts)
    k = r.kl_recovered
    return (
        f"| {name} | {effort} | {made['scale']:g} | {made['kl recovered on unseen references']:.3f}"
        f" | {k.value:.3f} ({k.low:.3f}–{k.high:.3f}) | {r.top1_adapter:.3f} ({r.top1_base:.3f}) |"
        f" {r.drift_adapter:.3f} ({r.drift_system:.3f}) | {r.kl_with_system:.3f} |"
        f" {made['seconds']['total']:.0f} | {made['bytes'] / 1000:.0f} |"
    )


def variants(model: BaseModel, name: str) -> None:
    """Rows of the other table: unseen references of `quick`, in torch."""
    torch.set_grad_enabled(False)
    settings = Settings.for_effort("quick")
    llm = load(model, vocab_only=True)
    prompts = prepare(llm, model, bundled()[name], seeds(0)[: settings.messages])
    base = open_for_compile(model, llm, Steps(quiet=True)).base
    found, _ = write_replies(
        llm, base, model.fingerprint, prompts, 1, True, lambda done, total: None
    )
    unseen, seen = found[-20:], found[:-20]
    front, own = (Pack(unseen, p) for p in (prompts.prefixes.teacher, prompts.prefixes.student))
    target = predictions(base, front)
    bare = mean_kl(base, own, target, predictions(base, own))
    for share, scales in SHARES.items():
        with patch.object(vector, "_SHARE", share):
            directions = vector.mean_differences(base, seen, prompts.prefixes)
        if share < 0.001:  # as good as none fed back: the mean differences themselves
            share, directions = 0, {i: d / share for i, d in directions.items()}
        kl = [mean_kl(base, own, target, vector.steered(base, own, directions, s)) for s in scales]
        each = [f"{s:g}: {1 - k / bare:.3f}" for s, k in zip(scales, kl, strict=True)]
        print(f"| {name} | {share:g} | {', '.join(each)} |", flush=True)


def main() -> None:
    """One row a persona."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("personas", nargs="*", default=list(bundled()))
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--variants", action="store_true")
    options = parser.parse_args()
    model = open_base(options.base)
    if options.variants:
        print("| persona | share fed back | KL recovered by scale |\n|---|---|---|")
    else:
        print(
            "| persona | effort | scale | on unseen references | KL recovered (95 %) | top-1 (bare)"
            " | drift (system) | KL vector + system | seconds | kB |\n" + "|---" * 10 + "|"
        )
    with tempfile.TemporaryDirectory(prefix="superego-") as folder:
        for name in options.personas:
            if options.variants:
                variants(model, name)
            else:
                print(
                    measured(model, name, options.effort, options.prompts, Path(folder)),
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""PEFT folders beside llama.cpp's own converter, and the pirate in transformers + peft.

Prints Markdown. Fetches llama-cpp-python's source archive through pip (76 MB, once). Needs the
extra dev. The second table's prompts are reference messages, not held-out ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import llama_cpp_source
import test_peft as parity
from conftest import requantized
from test_architectures import distance
from tiny import TINY, build

from superego.adapter import read_adapter
from superego.base import open_base
from superego.converters.references import seeds
from superego.converters.transformer import Base
from superego.dialogue import encode
from superego.evaluate import kl, log_softmax
from superego.history import manifesto_of
from superego.logits import ParallelContext
from superego.peft_export import export_peft
from superego.peft_import import import_peft
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate


def tiny_models(folder: Path) -> None:
    """One row an architecture: both converters, and the logits."""
    (folder / "bases").mkdir()
    sources = {name: build(folder / "bases" / f"{name}.gguf", TINY[name]) for name in TINY}
    found = parity.converted(sources.__getitem__, folder)
    print(
        "| architecture | tensors | same bits | peft beside llama.cpp | with rsLoRA and patterns: "
        "by Superego | by llama.cpp's converter |\n|---|---|---|---|---|---|"
    )
    jobs = {}
    wanted = {}
    rows = {}
    for name, pair in found.items():
        model = open_base(str(sources[name]))
        base = Base(model.header, torch.float32, resident=False)
        tokens = np.random.default_rng(5).integers(3, base.shape.n_vocab - 6, 40).tolist()

        def apart(lora: Path, model: Any = model, tokens: list[int] = tokens) -> np.ndarray:
            return parity.in_llama_cpp(model, tokens, read_adapter(lora))

        same = sum(np.array_equal(m, pair.ours[key]) for key, m in pair.theirs.items())
        plain = parity.in_transformers(
            parity.loaded(parity.checkpoint(name, base), folder / name / "peft"), tokens
        )
        made = parity.trained(
            parity.checkpoint(name, base), folder / name / "rs", use_rslora=True, **parity.PATTERNS
        )
        wanted[name] = parity.in_transformers(made, tokens)
        import_peft(folder / name / "rs", model, folder / f"{name}-rs.gguf", "F32")
        rows[name] = (
            f"| {name} | {len(pair.theirs)} | {same} | "
            f"{distance(plain, apart(folder / f'{name}-ours.gguf')):.4f} | "
            f"{distance(wanted[name], apart(folder / f'{name}-rs.gguf')):.4f} | "
        )
        jobs[name] = (folder / name / "base", folder / name / "rs", folder / f"{name}-rs2.gguf")
        wanted[name] = SimpleNamespace(logits=wanted[name], apart=apart)
    script = next(folder.glob("llama.cpp/*/vendor/llama.cpp/convert_lora_to_gguf.py"))
    llama_cpp_source.convert(script, list(jobs.values()))
    for name, row in rows.items():
        theirs = wanted[name].apart(jobs[name][2])
        print(f"{row}{distance(wanted[name].logits, theirs):.2f} |")


def real_model(adapter_path: Path, folder: Path, n_prompts: int) -> None:
    """KL recovered by an exported adapter in transformers, in float32 and bfloat16."""
    base = open_base("smollm2")
    halves = open_base(str(requantized(base, folder / "f16.gguf", 1)))
    adapter = read_adapter(adapter_path)
    llm = load(halves, n_ctx=256)
    template = ChatTemplate(base.header)
    messages = seeds(0)[-n_prompts:]
    teacher = encode(llm, template, manifesto_of(adapter).body, messages)
    student = encode(llm, template, None, messages)
    with ParallelContext(llm, teacher.prefix, n_prompts, 96) as context:
        replies, logits = context.greedy(teacher.rest, 32, stop_tokens(llm))
    target = [log_softmax(each) for each in logits]
    texts = [rest + reply[:-1] for rest, reply in zip(student.rest, replies, strict=True)]
    first = [len(rest) - 1 for rest in student.rest]

    def divergence(read: list[np.ndarray]) -> float:
        each = [kl(t, log_softmax(r)).mean() for t, r in zip(target, read, strict=True)]
        return float(np.mean(each))

    rows = {}
    with ParallelContext(llm, student.prefix, n_prompts, 96, [(adapter, 1.0)]) as context:
        rows["llama.cpp, F16 weights"] = context.read(texts, first)
        context.set_scales([0.0])
        bare = divergence(context.read(texts, first))
    for ranks in ("one", "own"):
        export_peft(adapter, halves, folder / ranks, ranks == "one")
    checkpoint = parity.smollm2_checkpoint.__wrapped__(halves)
    for dtype in (torch.float32, torch.bfloat16):
        for ranks in ("one", "own"):
            persona = parity.loaded(checkpoint, folder / ranks).to(dtype)
            read = []
            for text, start in zip(texts, first, strict=True):
                tokens = torch.tensor([student.prefix + text])
                with torch.no_grad():
                    found = persona(tokens).logits[0, len(student.prefix) + start :]
                read.append(found.float().numpy())
            name = str(dtype).removeprefix("torch.")
            rows[f"transformers + peft, {name}, --ranks {ranks}"] = read
            persona.unload()
    print("\n| where | KL recovered | logits beside llama.cpp's |\n|---|---|---|")
    mine = np.concatenate(rows["llama.cpp, F16 weights"])
    for name, read in rows.items():
        copy = [each.copy() for each in read]
        print(
            f"| {name} | {1 - divergence(copy) / bare:.3f} | "
            f"{distance(mine, np.concatenate(rows[name])):.4f} |"
        )


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, help="Made on smollm2; for the second table.")
    parser.add_argument("--prompts", type=int, default=24)
    options = parser.parse_args()
    llama_cpp_source.fetch()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="superego-") as folder:
        tiny_models(Path(folder))
        if options.adapter:
            real_model(options.adapter, Path(folder), options.prompts)


if __name__ == "__main__":
    main()

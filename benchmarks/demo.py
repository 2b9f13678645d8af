"""The demo: compile the pirate on smollm2, then one question answered three ways."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import superego
from superego.base import open_base
from superego.bundled import bundled
from superego.dialogue import encode
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate

QUESTION = "What should I have for lunch?"


def answer(llm: Any, template: ChatTemplate, system: str | None) -> tuple[int, float, str]:
    """Prompt tokens, seconds to the first token from an empty cache, and the reply."""
    encoded = encode(llm, template, system, [QUESTION])
    tokens = encoded.prefix + encoded.rest[0]
    llm.reset()
    llm._ctx.kv_cache_clear()
    stop, reply = stop_tokens(llm), []
    start = time.perf_counter()
    first = 0.0
    for token in llm.generate(tokens, temp=0.0):
        first = first or time.perf_counter() - start
        if token in stop or len(reply) == 48:
            break
        reply.append(token)
    return len(tokens), first, llm.detokenize(reply).decode("utf-8", "replace")


def main() -> None:
    """Runs the demo; the compile is the real command line."""
    path = Path("pirate.gguf")
    command = ["compile", "pirate", "--base", "smollm2", "-o", str(path), "--effort", "quick"]
    print(f"$ superego {' '.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / "superego"), *command], check=True)
    base = open_base("smollm2")
    llm, template = load(base, n_ctx=1024), ChatTemplate(base.header)
    answer(llm, template, None)  # warms the model's pages
    print(f"\nQuestion: {QUESTION}")
    ways = [
        ("bare base", *answer(llm, template, None)),
        ("base + system message", *answer(llm, template, bundled()["pirate"].body)),
    ]
    with superego.attach(llm, path):
        ways.append(("base + adapter", *answer(llm, template, None)))
    for name, tokens, first, reply in ways:
        print(f"\n[{name}] {tokens} prompt tokens, first token after {1000 * first:.0f} ms")
        print(reply.strip())


if __name__ == "__main__":
    main()

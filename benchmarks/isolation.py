"""The isolation bench: how many replies, all personas at once, equal the persona's alone.

Prints Markdown. Every persona is asked by itself first, one request at a time; then everything
twice, in random order, by 16 clients. Compared are the tokens, and bit for bit the
log-probabilities of the three best at each.

    python benchmarks/isolation.py --adapters pirate.gguf --bases smollm2 other.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import random

import httpx
from serving import running

from superego.base import open_base
from superego.evaluate import bundled
from superego.roster import base_name

QUESTIONS = 3
CLIENTS = 16


async def ask(
    http: httpx.AsyncClient, model: str, question: str, tokens: int
) -> tuple[list[str], list[float]]:
    """The reply's tokens and log-probabilities."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "logprobs": True,
        "top_logprobs": 3,
    }
    reply = (await http.post("/chat/completions", json=body)).raise_for_status().json()
    places = reply["choices"][0]["logprobs"]["content"]
    return [p["token"] for p in places], [x["logprob"] for p in places for x in p["top_logprobs"]]


async def measure(address: str, models: list[str], tokens: int) -> tuple[int, int, int]:
    """Replies, those with the same tokens, and those with the same bits."""
    keys = [(model, question) for model in models for question in bundled("heldout")[:QUESTIONS]]
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        alone = {key: await ask(http, *key, tokens) for key in keys}
        waiting = keys * 2
        random.Random(0).shuffle(waiting)
        pairs = []

        async def client() -> None:
            while waiting:
                key = waiting.pop()
                pairs.append((alone[key], await ask(http, *key, tokens)))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(pairs), sum(a[0] == b[0] for a, b in pairs), sum(a == b for a, b in pairs)


def main() -> None:
    """One row a base and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", nargs="+", default=["smollm2"])
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    print("| base | setting | replies | same tokens | same log-probabilities, bit for bit |")
    print("|---|---|---|---|---|")
    for base in options.bases:
        name = base_name(base, open_base(base))
        for setting in ("--exact", "--no-exact"):
            arguments = [f"a{i}={path}" for i, path in enumerate(options.adapters)]
            models = [name, *(f"a{i}" for i in range(len(options.adapters))), "steward"]
            arguments += ["steward", "--base", base, setting, "--n-ctx", "512"]
            arguments += ["--parallel", str(options.parallel)]
            arguments += ["--threads", str(options.threads)] if options.threads else []
            with running(*arguments) as address:
                n, words, bits = asyncio.run(measure(address, models, options.tokens))
            print(f"| {name} | {setting} | {n} | {words} | {bits} |", flush=True)


if __name__ == "__main__":
    main()

"""The serving bench: adapters against the same manifestos as system messages, in one run.

Prints Markdown. Starts `superego serve` once with every persona both ways. Each client asks a
random persona a held-out question, streams the reply, and asks again until the requests are
used up; replies have a fixed length. `--one` also measures clients that all ask one persona.

    python benchmarks/serving.py --adapters pirate.gguf steward.gguf terse.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from superego.evaluate import bundled


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """`superego serve` with these arguments; yields its address."""
    start = [sys.executable, "-c", "from superego.cli import main; main()", "serve"]
    server = subprocess.Popen(
        [*start, *arguments, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())["address"]
    finally:
        server.terminate()
        server.wait(20)


async def ask(http: httpx.AsyncClient, model: str, question: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first piece of text, and pieces (one a token)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    begun, first, pieces = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/chat/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith('data: {"choices":[{') and json.loads(line[6:])["choices"][0][
                "delta"
            ].get("content"):
                pieces += 1
                first = first or time.perf_counter() - begun
    return first, pieces


async def measure(
    address: str, models: list[str], clients: int, requests: int, tokens: int
) -> tuple[float, float, float]:
    """Tokens a second over all clients, median and 90th percentile of seconds to the first."""
    order = random.Random(0)
    waiting = [(order.choice(models), order.choice(bundled("heldout"))) for _ in range(requests)]
    found: list[tuple[float, int]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:

        async def client() -> None:
            while waiting:
                found.append(await ask(http, *waiting.pop(), tokens))

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    first = sorted(f for f, _ in found)
    return (
        len(found) * tokens / seconds,
        statistics.median(first),
        first[min(len(first) - 1, int(0.9 * len(first)))],
    )


def main() -> None:
    """Starts the server, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--adapters", type=Path, nargs="+", required=True, help="NAME[-*].gguf")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", action="store_true", help="also with one persona for everybody")
    parser.add_argument("--no-exact", action="store_true")
    options = parser.parse_args()
    names = [path.stem.partition("-")[0] for path in options.adapters]
    command = [f"{n}-adapter={p}" for n, p in zip(names, options.adapters, strict=True)]
    command += [f"{name}-system={name}" for name in names]
    command += ["--base", options.base, "--n-ctx", "512", "--parallel", str(options.parallel)]
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--no-exact"] if options.no_exact else []
    with running(*command) as address:
        ways = {
            "bare base": [options.base],
            "adapter": [f"{name}-adapter" for name in names],
            "system message": [f"{name}-system" for name in names],
        }
        if options.one:
            ways["adapter, one persona"] = [f"{names[0]}-adapter"]
            ways["system message, one persona"] = [f"{names[0]}-system"]
        print(f"{options.parallel} slots, {len(names)} personas, {options.tokens} tokens a reply\n")
        print("| clients | way | tokens/s | first token, median s | first token, 90 % s |")
        print("|---|---|---|---|---|")
        for clients in options.clients:
            for way, models in ways.items():
                n = max(8, 3 * clients // 2)
                speed, median, slow = asyncio.run(
                    measure(address, models, clients, n, options.tokens)
                )
                print(
                    f"| {clients} | {way} | {speed:.0f} | {median:.2f} | {slow:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()

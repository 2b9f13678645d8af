"""Serve: nobody gets another persona's words, strangers get nothing, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from conftest import refused, run, tiny_model

from superego.adapter import write_adapter
from superego.base import BaseModel
from superego.bundled import bundled
from superego.llama_server import computes_on_cpu_alone, find_server
from superego.roster import Refused, read_roster

TOKENS = 5
# A reply: its tokens, and the log-probabilities of the three best at each place
Reply = list[tuple[str, tuple[float, ...]]]


@dataclass
class Served:
    """A running `superego serve`."""

    process: subprocess.Popen[str]
    address: str
    models: list[str]

    @property
    def root(self) -> str:
        return self.address.removesuffix("/v1")

    def below(self) -> list[psutil.Process]:
        """The leash and llama-server."""
        return [p for p in self.everyone() if not any("template_worker" in c for c in p.cmdline())]

    def everyone(self) -> list[psutil.Process]:
        """These and the process that renders templates."""
        return psutil.Process(self.process.pid).children(recursive=True)


def started(*arguments: str, **environment: str) -> Served:
    command = [sys.executable, "-c", "from superego.cli import main; main()", "serve", *arguments]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"serve ended with {process.wait()}"
    said = json.loads(line)
    return Served(process, said["address"], said["models"])


def until(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def random_adapter(base: BaseModel, path: Path, seed: int, size: float = 1.0) -> Path:
    """Random pairs of rank 4 on the last ten layers' ffn_down: other words, cheaply."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name, tensor in base.header.tensors.items():
        if name.endswith("ffn_down.weight") and int(name.split(".")[1]) >= 20:
            out, width = tensor.shape
            a = rng.standard_normal((4, width)) / np.sqrt(width)
            pairs[name] = (a, size * rng.standard_normal((out, 4)))
    write_adapter(path, base.architecture, pairs, {})
    return path


@pytest.fixture(scope="module")
def adapters(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [random_adapter(smollm2, folder / f"r{seed}.gguf", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def served(pirate: Path, adapters: list[Path]) -> Iterator[Served]:
    found = started(
        *(str(pirate), f"mild={pirate}:0.5", *map(str, adapters), "steward"),
        *("--base", "smollm2", "--parallel", "8", "--n-ctx", "512", "--max-body", "100000"),
    )
    yield found
    found.process.terminate()
    assert found.process.wait(20) == 0


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.address, api_key="none", max_retries=0)


PERSONAS = ["smollm2", "pirate", "mild", "r1", "r2", "steward"]
QUESTIONS = [
    "What should I have for lunch?",
    "How do magnets work?",
    "Tell me a story about a dog.",
    "Who are you?",
]


async def ask(http: httpx.AsyncClient, model: str, *turns: str) -> Reply:
    """The reply to a conversation, whose turns are the user's and the model's in turn."""
    body = {
        "model": model,
        "messages": [
            {"role": "assistant" if i % 2 else "user", "content": turn}
            for i, turn in enumerate(turns)
        ],
        "temperature": 0,
        "max_tokens": TOKENS,
        "logprobs": True,
        "top_logprobs": 3,
    }
    reply = await http.post("/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == model
    tokens = reply.json()["choices"][0]["logprobs"]["content"]
    return [(t["token"], tuple(x["logprob"] for x in t["top_logprobs"])) for t in tokens]


def test_32_clients_of_5_personas_get_what_each_persona_says_alone(served: Served) -> None:
    """Bit for bit: another persona's adapter, scale or cached state would change some bit."""

    async def everything() -> None:
        async with httpx.AsyncClient(base_url=served.address, timeout=300) as http:
            keys = [(model, question) for model in PERSONAS for question in QUESTIONS]
            alone = {key: await ask(http, *key) for key in keys}
            for question in QUESTIONS:
                assert len({tuple(alone[model, question]) for model in PERSONAS}) == len(PERSONAS)
            waiting = [*keys, *random.Random(0).choices(keys, k=2 * 32 - len(keys))]
            random.Random(1).shuffle(waiting)
            wrong = []

            async def one_client() -> None:
                while waiting:
                    key = waiting.pop()
                    reply = await ask(http, *key)
                    if reply != alone[key]:
                        wrong.append((key, alone[key], reply))

            await asyncio.gather(*(one_client() for _ in range(32)))
            assert not wrong

    asyncio.run(everything())


def test_one_slot_holds_nothing_of_its_last_persona(
    pirate: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """One slot and one question: whatever was there before is the other persona's."""
    made = run(
        *("export", "llama-server", str(pirate), "--base", "smollm2"),
        "--alora",
        "-o",
        str(tmp_path),
    )
    assert made.exit_code == 0, made.stderr
    found = started(
        *(str(pirate), str(adapters[0]), f"activated={tmp_path / 'pirate.alora.gguf'}"),
        *("--base", "smollm2", "--parallel", "1", "--n-ctx", "512"),
    )

    async def walk() -> None:
        async with httpx.AsyncClient(base_url=found.address, timeout=60) as http:
            order = ["smollm2", "pirate", "activated", "r1", "pirate@0.3"]
            question = "Name three colours."
            first = {model: await ask(http, model, question) for model in order}
            assert len({tuple(reply) for reply in first.values()}) == len(order)
            for model in [*reversed(order), *order[::2], *order[1::2], "pirate", "smollm2"]:
                assert await ask(http, model, question) == first[model], model
            # a second turn: read behind the state that the first left, and from its start
            said = "".join(token for token, _ in first["r1"])
            turns = (question, said, "Why?")
            await ask(http, "r1", question)
            kept = await ask(http, "r1", *turns)
            await ask(http, "activated", *turns)
            assert await ask(http, "r1", *turns) == kept

    try:
        asyncio.run(walk())
    finally:
        found.process.terminate()
        assert found.process.wait(20) == 0


def test_the_openai_client_lists_chats_streams_and_completes(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["smollm2", "pirate", "mild", "r1", "r2", "steward"]
    assert client.models.retrieve("pirate@0.7").id == "pirate@0.7"
    options: Any = {
        "messages": [{"role": "user", "content": "Tell me about rain."}],
        "temperature": 0,
        "max_tokens": 12,
    }
    said = {
        model: client.chat.completions.create(model=model, **options).choices[0].message.content
        for model in ("smollm2", "pirate", "mild", "pirate@0.5", "pirate@1", "pirate@0", "steward")
    }
    assert said["pirate"] == said["pirate@1"] != said["smollm2"]
    assert said["mild"] == said["pirate@0.5"] != said["pirate"]
    assert said["pirate@0"] == said["smollm2"]
    stream = client.chat.completions.create(model="pirate", stream=True, **options)
    pieces = list(stream)
    assert {piece.model for piece in pieces} == {"pirate"}
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == said["pirate"]
    raw = {
        model: client.completions.create(
            model=model, prompt="Once upon a time", temperature=0, max_tokens=12
        )
        .choices[0]
        .text
        for model in ("smollm2", "r1")
    }
    assert raw["smollm2"] != raw["r1"]
    assert "".join(
        p.choices[0].text
        for p in client.completions.create(
            model="r1", prompt="Once upon a time", temperature=0, max_tokens=12, stream=True
        )
    ) == raw["r1"]  # fmt: skip


def test_several_choices_and_prompts_are_all_the_personas(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="r1", prompt=["Once upon a time", "The sea is"], temperature=0, max_tokens=8
    )
    alone = [
        client.completions.create(model="r1", prompt=p, temperature=0, max_tokens=8).choices[0].text
        for p in ("Once upon a time", "The sea is")
    ]
    assert [c.text for c in sorted(made.choices, key=lambda c: c.index)] == alone
    several = client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": "Who are you?"}],
        temperature=0,
        max_tokens=8,
        n=3,
    )
    assert len({choice.message.content for choice in several.choices}) == 1


def test_a_system_message_of_the_requests_own_works_on_top(client: openai.OpenAI) -> None:
    def reply(model: str, *messages: dict[str, str]) -> Any:
        return client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            max_tokens=8,  # type: ignore[arg-type]
        )

    own = {"role": "system", "content": "Answer in French."}
    user = {"role": "user", "content": "Who are you?"}
    body = bundled()["steward"].body
    for model in ("pirate", "steward", "smollm2"):
        assert reply(model, own, user).usage.prompt_tokens != reply(model, user).usage.prompt_tokens
    both = {"role": "system", "content": f"{body}\n\nAnswer in French."}
    got, expected = reply("steward", own, user), reply("smollm2", both, user)
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens
    assert got.choices[0].message.content == expected.choices[0].message.content


def test_bad_requests_get_openai_errors(client: openai.OpenAI, served: Served) -> None:
    hello: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="no persona 'nobody'; there are smollm2, pir"):
        client.chat.completions.create(model="nobody", messages=hello)
    for model, reason in {
        "pirate@much": "not a scale",
        "pirate@nan": "not a scale",
        "steward@0.5": "only adapters have a scale",
        "smollm2@0.5": "only adapters have a scale",
    }.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(model=model, messages=hello)
    with pytest.raises(openai.BadRequestError, match="plain completions do not have"):
        client.completions.create(model="steward", prompt="hi")
    for key in ("lora", "id_slot", "cache_prompt"):
        with pytest.raises(openai.BadRequestError, match=f"'{key}' is set by the server"):
            client.chat.completions.create(model="r1", messages=hello, extra_body={key: []})
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="r1", prompt="long " * 2000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as too_large:
        client.completions.create(model="r1", prompt="x" * 200_000)
    assert too_large.value.status_code == 413
    with httpx.Client(base_url=served.root, timeout=60) as http:
        path = "/v1/chat/completions"
        assert http.post(path, content=b"{}").status_code == 415
        plain = {"Content-Type": "application/json"}
        for content, word in {
            b"{": "not JSON",
            b"[]": "expected an object",
            b'{"model": "pirate", "temperature": NaN}': "not JSON",
            b'{"model": "pirate", "temperature": 1e999}': "not JSON",
            b"{}": "'model' is missing",
            b"[" * 50_000: "not JSON",
            b'{"model": "steward", "messages": 3}': "must be a list",
            b'{"model": "pirate", "messages": [{"role": 3}]}': "",
        }.items():
            reply = http.post(path, content=content, headers=plain)
            assert reply.status_code == 400, reply.text
            assert word in reply.json()["error"]["message"]
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert http.get(path).status_code == 405


def test_a_strange_host_is_refused(served: Served) -> None:
    port = served.root.rpartition(":")[2]
    for host, status in {
        f"evil.example:{port}": 403,
        "localhost.evil.example": 403,
        "127.0.0.1.evil.example": 403,
        "": 403,
        f"localhost:{port}": 200,
        "LOCALHOST": 200,
        f"127.0.0.1:{port}": 200,
        f"[::1]:{port}": 200,
    }.items():
        assert httpx.get(f"{served.address}/models", headers={"Host": host}).status_code == status


def test_health_and_metrics(client: openai.OpenAI, served: Served) -> None:
    assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}
    client.completions.create(model="r2", prompt="hi", max_tokens=1)
    list(client.completions.create(model="r2", prompt="hi", max_tokens=1, stream=True))
    lines = httpx.get(f"{served.root}/metrics").text.splitlines()
    assert "superego_llama_server_up 1.0" in lines
    assert "superego_requests_active 0.0" in lines
    count = next(x for x in lines if x.startswith('superego_requests_total{persona="r2"'))
    assert float(count.split()[1]) >= 2
    assert 'superego_first_piece_seconds_count{persona="r2"} 1.0' in lines


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(served: Served, stream: bool) -> None:
    """All eight slots are taken by long replies nobody waits for; the next one is not kept."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me a very long story."}],
        "max_tokens": 400,
        "stream": stream,
        "logit_bias": [[2, False]],  # never ends by itself
    }

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.address, timeout=60) as http:

            async def one() -> None:
                async with http.stream("POST", "/chat/completions", json=body) as reply:
                    async for _ in reply.aiter_bytes():
                        await asyncio.sleep(60)

            tasks = [asyncio.create_task(one()) for _ in range(8)]
            await asyncio.sleep(1.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    start = time.monotonic()
    short = {**body, "max_tokens": 1, "stream": False}
    httpx.post(f"{served.address}/chat/completions", json=short, timeout=60).raise_for_status()
    assert time.monotonic() - start < 6  # eight such replies take 15 s and more
    until(lambda: "superego_requests_active 0.0" in httpx.get(f"{served.root}/metrics").text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "t.gguf")


def test_a_dead_llama_server_is_started_again(tiny: Path) -> None:
    found = started("--base", str(tiny), "--parallel", "2", "--n-ctx", "256")
    try:
        body = {"model": "t", "prompt": "hi", "max_tokens": 4}
        post = f"{found.address}/completions"
        assert httpx.post(post, json=body, timeout=30).status_code == 200
        for victim in (1, 0):  # llama-server itself, then the leash
            before = {p.pid for p in found.below()}
            assert len(before) == 2
            found.below()[victim].send_signal(signal.SIGKILL)
            seen = set()

            def again(seen: set[int] = seen) -> bool:
                reply = httpx.post(post, json=body, timeout=30)
                seen.add(reply.status_code)
                if reply.status_code == 503:
                    assert reply.headers["retry-after"] == "1"
                return reply.status_code == 200 and 503 in seen

            until(again)
            assert seen <= {200, 502, 503}
            until(lambda before=before: not any(psutil.pid_exists(p) for p in before))
        text = httpx.get(f"{found.root}/metrics").text
        assert "superego_llama_server_restarts 2.0" in text
    finally:
        found.process.terminate()
        found.process.wait(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("SIGKILL is POSIX")
    adapter, temporary = tmp_path / "a.gguf", tmp_path / "temporary"
    temporary.mkdir()
    pairs = {"blk.0.ffn_down.weight": (np.ones((4, 128)), np.ones((64, 4)))}
    write_adapter(adapter, "llama", pairs, {})
    found = started(
        *(str(adapter), "--base", str(tiny), "--parallel", "1", "--n-ctx", "256"),
        TMPDIR=str(temporary),
    )
    assert len(found.below()) == 2
    below = found.everyone()
    assert [p.name for p in temporary.rglob("*.gguf")] == ["0.gguf"]  # of rank 5
    found.process.send_signal(number)
    assert found.process.wait(20) == (-number if number == signal.SIGKILL else 0)
    until(lambda: not any(p.is_running() for p in below))
    until(lambda: not list(temporary.iterdir()))


def test_a_key_is_asked_for_where_one_is_set(tiny: Path) -> None:
    found = started(
        *("--base", str(tiny), "--host", "0.0.0.0", "--parallel", "1", "--n-ctx", "256"),
        SUPEREGO_API_KEY="secret",
    )
    try:
        root = found.root.replace("0.0.0.0", "127.0.0.1")
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(root + path).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{root}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{root}/v1", api_key="secre").models.list()
        assert [m.id for m in openai.OpenAI(base_url=f"{root}/v1", api_key="secret").models.list()]
        # llama-server itself is behind a key of its own
        (port,) = {
            c.laddr.port
            for p in found.below()
            for c in p.net_connections()
            if c.status == psutil.CONN_LISTEN
        }
        assert httpx.get(f"http://127.0.0.1:{port}/props").status_code == 401
    finally:
        found.process.terminate()
        found.process.wait(20)


def test_a_template_without_a_system_role_gets_the_manifesto_in_the_first_turn(
    tmp_path: Path,
) -> None:
    from superego.base import open_base

    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    model = open_base(str(tiny_model(tmp_path / "n.gguf", template=template)))
    roster = read_roster(model, "base", ["me=terse"])
    body: dict[str, Any] = {"model": "me", "messages": [{"role": "user", "content": "hi"}]}
    roster.rewrite(body, chat=True)
    assert body["messages"] == [{"role": "user", "content": f"{bundled()['terse'].body}\n\nhi"}]
    picture = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(Refused, match="must be text"):
        roster.rewrite({"model": "me", "messages": picture}, chat=True)


def test_bad_input_is_refused_in_one_line(
    tiny: Path, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("--base", "smollm2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: cannot listen" in refused("serve", *base, "--port", port)
    assert "give --api-key" in refused("serve", *base, "--host", "0.0.0.0")
    assert "not an address" in refused("serve", *base, "--host", "no such", "--api-key", "k")
    assert "another persona" in refused("serve", *base, str(pirate), "pirate")
    assert "taken by the base" in refused("serve", *base, f"smollm2={pirate}")
    assert "another base" in refused("serve", "--base", str(tiny), str(pirate))
    assert "no scale" in refused("serve", *base, "terse:0.5")
    assert "cannot be a model id" in refused("serve", *base, f"a@b={pirate}")
    assert "between -100" in refused("serve", *base, f"{pirate}:101")
    assert "no such file" in refused("serve", *base, "nobody")
    comma = tmp_path / "a,b.gguf"
    comma.write_bytes(pirate.read_bytes())
    assert "comma" in refused("serve", *base, f"x={comma}")
    split = tiny_model(tmp_path / "split.gguf", split__count=2)
    assert "finds the others by name" in refused("serve", "--base", str(split))
    assert "no such program" in refused("serve", *base, "--llama-server", "none")
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\necho 'error: unknown argument: -cram' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = refused("serve", *base, "--port", "0", "--llama-server", str(broken))
    assert "ended with status 1 while starting: error: unknown argument: -cram" in said
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == [str(broken)]
    monkeypatch.setenv("PATH", "")
    assert find_server()[1:] == ["-m", "superego.wheel_server"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from superego.errors import SuperegoError

    with pytest.raises(SuperegoError, match=r"pip install 'superego\[serve\]'"):
        find_server()


def test_a_device_beside_the_cpu_is_seen(tmp_path: Path) -> None:
    assert computes_on_cpu_alone([sys.executable, "-m", "superego.wheel_server"])
    program = tmp_path / "llama-server"
    for text, alone in {
        "echo Available devices:": True,
        "echo Available devices:; echo '  (none)'": True,
        "echo Available devices:; echo '  CUDA0: A GPU (24111 MiB, 23000 MiB free)'": False,
        "echo unknown argument; exit 1": False,
    }.items():
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert computes_on_cpu_alone([str(program)]) is alone
    assert not computes_on_cpu_alone([str(tmp_path / "none")])


def test_the_commands_of_the_page_run(
    pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "llama-server.md").read_text("utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```sh\n")[1:]]
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert [line.split()[:2] for line in lines] == [
        ["superego", "serve"],
        ["curl", "http://127.0.0.1:8080/v1/chat/completions"],
        ["superego", "export"],
        ["superego", "export"],
    ]
    (tmp_path / "pirate.gguf").write_bytes(pirate.read_bytes())
    monkeypatch.chdir(tmp_path)
    found = started(*shlex.split(lines[0])[2:])
    try:
        assert found.models == ["smollm2", "pirate", "mild", "steward"]
        words = shlex.split(lines[1])
        url = words[1].replace("http://127.0.0.1:8080/v1", found.address)
        headers = dict([words[words.index("-H") + 1].split(": ")])
        data = words[words.index("-d") + 1]
        reply = httpx.post(url, content=data, headers=headers, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] > 1
    finally:
        found.process.terminate()
        found.process.wait(20)
    for line in lines[2:]:
        assert run(*shlex.split(line)[1:]).exit_code == 0
    assert (tmp_path / "out" / "pirate.alora.gguf").exists()

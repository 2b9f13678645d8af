"""Export to llama-server: the printed command runs, the printed requests say what they should."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import refused, run, tiny_model

from superego.adapter import Adapter, read_adapter, write_adapter
from superego.alora import invocation_tokens
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import log_softmax
from superego.llama_server import find_server, free_port
from superego.logits import ParallelContext
from superego.roster import ALORA_KEY
from superego.runtime import load
from superego.template import ChatTemplate


@contextmanager
def running(command: list[str]) -> Iterator[None]:
    """The printed command, with the program that is here in the place of `llama-server`."""
    assert command[0] == "llama-server"
    address = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    process = subprocess.Popen(
        [*find_server(), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None, "llama-server ended"
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def said(address: str, body: dict[str, Any], **more: Any) -> tuple[str, int]:
    """The reply at temperature 0 and how many of its prompt's tokens were cached."""
    sent = {**body, "temperature": 0, "max_tokens": 8, **more}
    reply = httpx.post(address, json=sent, timeout=60)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    return found["choices"][0]["message"]["content"], found["timings"]["cache_n"]


def test_the_printed_command_and_requests_are_those_that_work(pirate: Path, tmp_path: Path) -> None:
    port, folder = str(free_port()), tmp_path / "out"
    made = run(
        *("export", "llama-server", str(pirate), "steward", "--base", "smollm2"),
        *("--port", port, "--n-ctx", "512", "-o", str(folder)),
    )
    assert made.exit_code == 0, made.stderr
    command, *requests = made.stdout.splitlines()
    script = (folder / "llama-server.sh").read_text()
    assert script == f"#!/bin/sh\nexec {command}\n"
    assert (folder / "llama-server.sh").stat().st_mode & 0o100
    assert "-cram 0 --no-kv-unified" in command
    bodies = {
        name: json.loads((folder / f"request-{name}.json").read_text())
        for name in ("smollm2", "pirate", "steward")
    }
    assert [b["lora"] for b in bodies.values()] == [
        [{"id": 0, "scale": scale}] for scale in (0.0, 1.0, 0.0)
    ]
    with running(shlex.split(command)):
        for line, body in zip(requests, bodies.values(), strict=True):
            words = shlex.split(line)  # the printed request is the written one
            assert json.loads(words[words.index("-d") + 1]) == body
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        replies = {name: said(address, body)[0] for name, body in bodies.items()}
        assert len(set(replies.values())) == 3
        for name in ("pirate", "smollm2", "pirate", "steward", "smollm2"):
            assert said(address, bodies[name], cache_prompt=False)[0] == replies[name]


def first_word(
    llm: Any, smollm2: BaseModel, adapter: Adapter, message: str
) -> dict[str, np.ndarray]:
    """Log-probabilities (n_vocab,) of the reply's first token, by how the adapter is used."""
    template = ChatTemplate(smollm2.header)
    encoded = encode(llm, template, None, [message])
    tokens = encoded.rest[0]
    header = len(tokens) - len(invocation_tokens(llm, template))
    found = {}
    with ParallelContext(llm, encoded.prefix, 1, len(tokens), [(adapter, 0.0)]) as context:
        for way, scale, switch in (
            ("bare", 0.0, None),
            ("plain", 1.0, None),
            ("one early", 0.0, ([header - 1], [1.0])),
            ("activated", 0.0, ([header], [1.0])),
            ("one late", 0.0, ([header + 1], [1.0])),
        ):
            context.set_scales([scale])
            found[way] = log_softmax(context.read([tokens], [len(tokens) - 1], switch)[0])[0]
    return found


def test_an_activated_adapter_keeps_the_bases_state(
    smollm2: BaseModel, llm: Any, tmp_path: Path
) -> None:
    # random, and strong from the reply's header on: where it begins to act is seen in each word
    rng = np.random.default_rng(0)
    pairs = {}
    for name in smollm2.header.tensors:
        if name.endswith("attn_output.weight"):  # (576, 576)
            a, b = rng.standard_normal((4, 576)), rng.standard_normal((576, 4))
            pairs[name] = (a, 0.2 * b)
    write_adapter(tmp_path / "random.gguf", "llama", pairs, {"superego.name": "random"})
    port, folder = str(free_port()), tmp_path / "out"
    made = run(
        *("export", "llama-server", str(tmp_path / "random.gguf"), "--base", "smollm2", "--alora"),
        *("--json", "--port", port, "--n-ctx", "512", "--parallel", "1", "-o", str(folder)),
    )
    assert made.exit_code == 0, made.stderr
    assert made.stderr == ""
    report = json.loads(made.stdout)
    plain = read_adapter(tmp_path / "random.gguf")
    activated = read_adapter(folder / "random.alora.gguf")
    tokens = smollm2.header.metadata["tokenizer.ggml.tokens"]
    header = [tokens[i] for i in activated.header.metadata[ALORA_KEY]]
    assert header == ["<|im_start|>", "ass", "istant", "Ċ"]
    rest = {k: v for k, v in activated.header.metadata.items() if k != ALORA_KEY}
    assert rest == plain.header.metadata
    for name, tensor in plain.header.tensors.items():
        other = activated.header.tensors[name]
        a = np.fromfile(plain.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        b = np.fromfile(activated.path, np.uint8, other.n_bytes, offset=other.offset)
        assert np.array_equal(a, b)
    requests = report["requests"]
    with running(report["command"]):
        # base, then persona, in one slot: what the base read of the question is used again
        bare, cached = said(report["address"], requests["smollm2"])
        assert cached == 0
        persona, cached = said(report["address"], requests["random"])
        assert persona != bare
        assert cached >= 25  # of 34: up to the reply's header
        assert said(report["address"], requests["smollm2"])[0] == bare
        more = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 10}
        reply = httpx.post(report["address"], json={**requests["random"], **more}, timeout=60)
    # llama-server begins one token before the header, and so does benchmarks/alora.py
    best = reply.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    message = requests["random"]["messages"][0]["content"]
    apart = {
        way: max(abs(values[b["id"]] - b["logprob"]) for b in best)
        for way, values in first_word(llm, smollm2, plain, message).items()
    }
    assert min(apart, key=lambda way: apart[way]) == "one early", apart
    assert apart["one early"] < 0.2 * apart["bare"], apart


def test_an_activated_copy_of_a_compiled_adapter_is_warned_of(pirate: Path, tmp_path: Path) -> None:
    made = run(
        *("export", "llama-server", str(pirate), "--base", "smollm2", "--alora"),
        *("-o", str(tmp_path / "out")),
    )
    assert made.exit_code == 0, made.stderr
    assert "expect a small part of the persona" in made.stderr


def test_bad_input_is_refused_in_one_line(pirate: Path, tmp_path: Path) -> None:
    export = ("export", "llama-server", str(pirate), "--base")
    assert "give the folder with -o" in refused(*export, "smollm2", "--alora")
    taken = tmp_path / "file"
    taken.write_text("")
    assert "cannot be made" in refused(*export, "smollm2", "-o", str(taken))
    assert "cannot be made" in refused(*export, "smollm2", "-o", str(tmp_path / "no" / "folder"))
    tiny = tiny_model(tmp_path / "t.gguf")
    assert "another base" in refused(*export, str(tiny))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pirate.gguf").write_bytes(pirate.read_bytes())
    twice = (str(pirate), f"other={tmp_path / 'a' / 'pirate.gguf'}")
    said = refused(
        *("export", "llama-server", *twice, "--base", "smollm2", "--alora"),
        *("-o", str(tmp_path / "out")),
    )
    assert "two adapters of one file name" in said


def test_a_template_that_would_never_activate_is_refused(
    smollm2: BaseModel, tmp_path: Path
) -> None:
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tiny_model(tmp_path / "t.gguf", template=silent)
    pairs = {"blk.0.ffn_down.weight": (np.zeros((1, 128)), np.zeros((64, 1)))}
    write_adapter(tmp_path / "a.gguf", "llama", pairs, {})
    said = refused(
        *("export", "llama-server", str(tmp_path / "a.gguf"), "--base", str(path), "--alora"),
        *("-o", str(tmp_path / "out")),
    )
    assert "puts nothing before a reply" in said
    assert not list((tmp_path / "out").iterdir())
    # the real tokenizer joins a space and the word behind it
    merging = silent.replace("}}", "}} ") + "{% if add_generation_prompt %}reply:{% endif %}"
    metadata = {**smollm2.header.metadata, "tokenizer.chat_template": merging}
    template = ChatTemplate(dataclasses.replace(smollm2.header, metadata=metadata))
    with pytest.raises(SuperegoError, match="merges with what is before it"):
        invocation_tokens(load(smollm2, vocab_only=True), template)

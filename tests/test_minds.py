"""One base, many minds: contexts apart, and no trace of what was attached before."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model

import superego
from superego.adapter import write_adapter
from superego.base import BaseModel, open_base
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.minds import fork
from superego.runtime import load
from superego.session import save_session


def tiny_adapter(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    pairs = {
        f"blk.{i}.{name}.weight": (
            rng.standard_normal((4, width)) * 0.2,
            rng.standard_normal((64, 4)) * 0.2,
        )
        for i in range(2)
        for name, width in (("attn_output", 64), ("ffn_down", 128))
    }
    write_adapter(path, "llama", pairs, {"general.name": path.stem})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minds")


@pytest.fixture(scope="module")
def model(folder: Path) -> BaseModel:
    return open_base(str(tiny_model(folder / "tiny.gguf")))


@pytest.fixture(scope="module")
def adapters(folder: Path) -> list[Path]:
    return [tiny_adapter(folder / f"{name}.gguf", i) for i, name in enumerate("abc")]


def reply(llm: Any, text: str) -> list[int]:
    tokens = llm.tokenize(text.encode(), add_bos=False)
    return list(itertools.islice(llm.generate(tokens, temp=0.0), 6))


def last_logits(llm: Any) -> bytes:
    pointer = llm._ctx.get_logits()
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_changes_equals_a_fresh_model(
    model: BaseModel, adapters: list[Path], seed: int
) -> None:
    """Attach, swap, scale, chat and detach at random; every reply is compared bit for bit."""
    rng = random.Random(seed)
    live = load(model, n_ctx=256)
    here: list[tuple[superego.Attachment, Path, float]] = []
    said: list[str] = []  # since the last change: what a fresh model has to be told too
    for _ in range(25):
        action = rng.choice(["attach", "swap", "scale", "chat", "chat", "chat", "detach", "all"])
        path, scale = rng.choice(adapters), rng.choice([-0.5, 0.0, 0.5, 1.0])
        if action == "attach" and len(here) < 3:
            here.append((superego.attach(live, path, scale), path, scale))
        elif action == "swap":
            here = [(superego.swap(live, path, scale), path, scale)]
        elif action == "scale" and here:
            i = rng.randrange(len(here))
            here[i][0].set_scale(scale)
            here[i] = (here[i][0], here[i][1], scale)
        elif action == "detach" and here:
            here.pop(rng.randrange(len(here)))[0].detach()
        elif action == "all":
            superego.detach(live)
            here = []
        elif action == "chat":
            said.append("".join(rng.choices("abcdefgh ", k=rng.randint(4, 30))))
            answer = reply(live, said[-1])
            other = load(model, n_ctx=256)
            for _, each, value in here:
                superego.attach(other, each, value)
            answers = [reply(other, text) for text in said]
            assert answer == answers[-1]
            assert last_logits(live) == last_logits(other)
            continue
        else:
            continue
        said = []
    superego.detach(live)


def test_a_failed_swap_changes_nothing(
    model: BaseModel, adapters: list[Path], folder: Path
) -> None:
    llm = load(model, n_ctx=256)
    superego.attach(llm, adapters[0], 0.5)
    before = reply(llm, "hello there")
    bad = folder / "bad.gguf"
    write_adapter(bad, "llama", {"blk.9.ffn_down.weight": (np.ones((2, 8)), np.ones((8, 2)))}, {})
    with pytest.raises(SuperegoError, match="made for another base"):
        superego.swap(llm, bad)
    assert [a.scale for a in superego.attachments(llm)] == [0.5]
    assert reply(llm, "hello there") == before


def test_a_session_is_gone_when_an_adapter_changes(
    model: BaseModel, adapters: list[Path], folder: Path
) -> None:
    llm = load(model, n_ctx=256)
    path = folder / "s.session"
    save_session(llm, model, Manifesto("s", "Be kind."), path)
    session = superego.attach(llm, path)
    assert session.attached
    assert llm.n_tokens > 0
    superego.attach(llm, adapters[0])
    assert not session.attached
    assert llm.n_tokens == 0
    with pytest.warns(UserWarning, match="adapters: made with none"):
        assert superego.attach(llm, path).attached
    swapped = superego.swap(llm, path)
    assert swapped.attached
    assert superego.attachments(llm) == []
    assert llm.n_tokens > 0


@pytest.fixture
def personas(model: BaseModel) -> Iterator[superego.Personas]:
    with superego.Personas(load(model, n_ctx=256)) as found:
        yield found


def test_minds_share_weights_and_nothing_else(
    personas: superego.Personas, model: BaseModel, adapters: list[Path]
) -> None:
    bare = reply(load(model, n_ctx=256), "good morning")
    for path in adapters:
        personas.add(path.stem, path, n_ctx=256)
    personas.add("bare", n_ctx=256)
    assert list(personas) == ["a", "b", "c", "bare"]
    expected = {}
    for path in adapters:
        alone = load(model, n_ctx=256)
        superego.attach(alone, path)
        expected[path.stem] = reply(alone, "good morning")
    for _ in range(3):  # round and round: nobody's cache is touched by the others
        for name in ("a", "b", "c"):
            assert reply(personas[name], "good morning") == expected[name]
        assert reply(personas["bare"], "good morning") == bare
    assert len({id(mind._model) for mind in personas.values()}) == 1
    assert personas.context_bytes("a") > 0
    with pytest.raises(SuperegoError, match="there is a persona 'a' already"):
        personas.add("a")
    personas.remove("a")
    with pytest.raises(SuperegoError, match="no persona 'a'; there are: b, c, bare"):
        personas["a"]
    assert reply(personas["b"], "good morning") == expected["b"]


def test_each_keeps_its_conversation(
    personas: superego.Personas, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    personas.add("a", adapters[0], n_ctx=512)
    personas.add("b", system="Be brief.", n_ctx=512)
    list(personas.chat("a").reply("hello", max_tokens=4))
    list(personas.chat("b").reply("hello", max_tokens=4))
    mind = personas["a"]
    read: list[int] = []
    whole = type(mind).eval
    monkeypatch.setattr(
        type(mind), "eval", lambda self, tokens: (read.append(len(tokens)), whole(self, tokens))[1]
    )
    list(personas.chat("a").reply("and now?", max_tokens=1))
    assert 0 < read[0] < mind.n_tokens - 10  # the first turn was not read again
    assert len(personas.chat("a").messages) == 4


def test_a_fork_is_closed_without_its_model(model: BaseModel) -> None:
    llm = load(model, n_ctx=256)
    before = reply(llm, "one two three")
    other = fork(llm)
    assert reply(other, "one two three") == before
    other.close()
    del other
    assert reply(llm, "one two three") == before

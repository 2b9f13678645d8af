"""The layer walk computes what llama.cpp computes, on the same file.

Tolerance: llama.cpp multiplies quantized weights with activations rounded to 8 bits and
keeps keys and values in 16 bits, the walk multiplies dequantized weights in float32. That
rounding is what remains; a wrong rotation, norm or permutation gives distances near 1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from superego.adapter import read_adapter
from superego.base import open_base
from superego.converters.adapter_changes import pairs
from superego.converters.closed_form import solve
from superego.converters.decode import greedy, prefill
from superego.converters.streams import (
    Conversation,
    Pack,
    Prefixes,
    Streams,
    mean_kl,
    predictions,
)
from superego.converters.transformer import Base
from superego.converters.walk import Aside, Walk
from superego.errors import SuperegoError
from superego.gguf_file import read_header
from superego.logits import ParallelContext
from superego.runtime import load

TOLERANCE = 0.06  # relative distance of centred logits


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def distance(a: np.ndarray, b: np.ndarray) -> float:
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tiny_models_agree_with_llama_cpp(tmp_path: Path, architecture: str) -> None:
    path = tiny_model(tmp_path / "t.gguf", architecture)
    llm = load(open_base(str(path)), n_ctx=256)
    rng = np.random.default_rng(3)
    prefix = rng.integers(3, 259, 12).tolist()
    texts = [rng.integers(3, 259, n).tolist() for n in (9, 5, 17)]
    with ParallelContext(llm, prefix, 3, 20) as context:
        theirs = context.read(texts, [0, 0, 0])
    base = Base(read_header(path), torch.float32, resident=True)
    # every token is "predicted": a prompt of one token, the rest as its reply
    pack = Pack([Conversation(t[:1], [*t[1:], 0]) for t in texts], prefix)
    ours = base.logits(predictions(base, pack)).numpy()
    order = sorted(range(3), key=lambda i: len(texts[i]))
    assert distance(np.concatenate([theirs[i] for i in order]), ours) < TOLERANCE


def test_smollm2_agrees_with_llama_cpp_bare_and_with_the_written_adapter(
    llm: Any, smollm2: Any, pirate: Path
) -> None:
    """The written file in llama.cpp against the same numbers in the walk."""
    prefix = llm.tokenize(b"<|im_start|>system\nYou are calm.<|im_end|>\n", False, True)
    texts = [
        llm.tokenize(t, False, True)
        for t in (b"<|im_start|>user\nWhat is rain?<|im_end|>\n", b"<|im_start|>user\nHi")
    ]
    adapter = read_adapter(pirate)
    with ParallelContext(llm, prefix, 2, 40, [(adapter, 1.0)]) as context:
        with_it = context.read(texts, [0, 0])
        context.set_scales([0.0])
        bare = context.read(texts, [0, 0])
    base = Base(smollm2.header, torch.float32, resident=True)
    pack = Pack([Conversation(t[:1], [*t[1:], 0]) for t in texts], prefix)
    changes = changes_of(pirate)
    order = sorted(range(2), key=lambda i: len(texts[i]))
    ours = base.logits(predictions(base, pack)).numpy()
    assert distance(np.concatenate([bare[i] for i in order]), ours) < TOLERANCE
    ours_with = base.logits(predictions(base, pack, changes)).numpy()
    assert distance(np.concatenate([with_it[i] for i in order]), ours_with) < TOLERANCE
    assert distance(ours, ours_with) > 2 * TOLERANCE  # the adapter does something


def changes_of(path: Path) -> Any:
    from gguf import GGUFReader

    from superego.converters.streams import Change

    found = {t.name: torch.from_numpy(np.array(t.data)).float() for t in GGUFReader(path).tensors}
    alpha = read_adapter(path).alpha
    return {
        (int(name.split(".")[1]), name.split(".")[2]): Change(
            value, found[name.replace("lora_a", "lora_b")] * (alpha / len(value))
        )
        for name, value in found.items()
        if name.endswith("lora_a")
    }


def test_greedy_decoding_equals_argmax_over_whole_texts(tmp_path: Path) -> None:
    base = Base(read_header(tiny_model(tmp_path / "t.gguf")), torch.float32, resident=True)
    rng = np.random.default_rng(5)
    prefix = rng.integers(3, 259, 7).tolist()
    prompts = [rng.integers(3, 259, n).tolist() for n in (3, 6, 11)]
    steps: list[int] = []
    replies = greedy(base, prompts, prefill(base, prefix), [6, 6, 6], set(), steps.append)
    assert steps == [3, 6, 9, 12, 15, 18]
    for prompt, reply in zip(prompts, replies, strict=True):
        pack = Pack([Conversation(prompt, reply)], prefix)
        assert base.logits(predictions(base, pack)).argmax(-1).tolist() == reply
    stop = {replies[0][2]}
    stopped = greedy(base, prompts, prefill(base, prefix), [6, 6, 6], stop, steps.append)
    for reply, whole in zip(stopped, replies, strict=True):
        end = next((i + 1 for i, t in enumerate(whole) if t in stop), 6)
        assert reply == whole[:end]
    limited = greedy(base, prompts, prefill(base, prefix), [6, 2, 4], set(), steps.append)
    assert limited == [replies[0], replies[1][:2], replies[2][:4]]
    assert steps[-1] == 12


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_closed_form_recovers_on_what_it_saw(tmp_path: Path, architecture: str) -> None:
    """At full rank and almost no ridge, the student reproduces the teacher's predictions."""
    base = Base(
        read_header(tiny_model(tmp_path / "t.gguf", architecture)), torch.float32, resident=True
    )
    rng = np.random.default_rng(9)
    prefixes = Prefixes([*rng.integers(3, 259, 20).tolist(), 4, 5], [7, 8, 4, 5])
    assert prefixes.common == 2
    talks = [
        Conversation(rng.integers(3, 259, 5).tolist(), rng.integers(3, 259, 8).tolist())
        for _ in range(6)
    ]
    changes = solve(base, talks, prefixes, rank=64, ridges={"attn_output": 1e-4, "ffn_down": 1e-4})
    teacher, student = Pack(talks, prefixes.teacher), Pack(talks, prefixes.student)
    target = predictions(base, teacher)
    before = mean_kl(base, student, target, predictions(base, student))
    after = mean_kl(base, student, target, predictions(base, student, changes))
    assert after < 0.1 * before
    assert set(pairs(changes)) == {
        f"blk.{i}.{w}.weight" for i in (0, 1) for w in ("attn_output", "ffn_down")
    }


def test_conversations_walked_aside_change_no_fit_and_are_measured_as_by_walks_of_their_own(
    tmp_path: Path,
) -> None:
    base = Base(read_header(tiny_model(tmp_path / "t.gguf")), torch.float32, resident=True)
    rng = np.random.default_rng(9)
    prefixes = Prefixes([*rng.integers(3, 259, 20).tolist(), 4, 5], [7, 8, 4, 5])
    talks = [
        Conversation(rng.integers(3, 259, n).tolist(), rng.integers(3, 259, 14 - n).tolist())
        for n in (5, 2, 7, 4, 9, 3)
    ]
    unseen = Aside(talks[4:])
    ridges = {"attn_output": 0.1, "ffn_down": 0.1}
    changes = solve(base, talks[:4], prefixes, 16, ridges, unseen=unseen)
    alone = solve(base, talks[:4], prefixes, 16, ridges)
    for key, change in changes.items():
        product, other = change.b @ change.a, alone[key].b @ alone[key].a
        assert torch.allclose(product, other, atol=1e-4 * float(other.abs().max()))
    teacher, student = Pack(talks[4:], prefixes.teacher), Pack(talks[4:], prefixes.student)
    target = predictions(base, teacher)
    assert unseen.kl() == pytest.approx(
        [
            mean_kl(base, student, target, predictions(base, student)),
            mean_kl(base, student, target, predictions(base, student, changes)),
        ],
        rel=1e-3,
    )


def test_a_fit_goes_on_with_fewer_conversations_as_if_the_others_had_ended_there(
    tmp_path: Path,
) -> None:
    base = Base(read_header(tiny_model(tmp_path / "t.gguf")), torch.float32, resident=True)
    rng = np.random.default_rng(9)
    prefixes = Prefixes([*rng.integers(3, 259, 20).tolist(), 4, 5], [7, 8, 4, 5])
    talks = [  # of rising length
        Conversation(rng.integers(3, 259, 3).tolist(), rng.integers(3, 259, n).tolist())
        for n in (4, 5, 6, 8, 9, 12, 13)
    ]
    fitted, unseen = talks[:6], talks[6:]
    ridges = {"attn_output": 0.1, "ffn_down": 0.1}
    told: list[tuple[int, int]] = []

    def bear(done: int, n: int) -> int:
        told.append((done, n))
        return 3

    aside = Aside(unseen)
    changes = solve(base, fitted, prefixes, 16, ridges, unseen=aside, bear=bear)
    assert told == [(1, 6)]  # of the last layer of two nobody asks
    whole = solve(base, fitted, prefixes, 16, ridges)
    first = {key: (each.a, each.b) for key, each in whole.items() if key[0] == 0}
    rest: Any = SimpleNamespace(layers=1, found=first, add=lambda *arguments: None)
    expected = solve(base, fitted[::2], prefixes, 16, ridges, unfinished=rest)
    assert set(changes) == set(expected) == set(whole)
    for key, change in changes.items():
        product, other = change.b @ change.a, expected[key].b @ expected[key].a
        assert torch.allclose(product, other, atol=1e-4 * float(other.abs().max()))
    target = predictions(base, Pack(unseen, prefixes.teacher))
    student = Pack(unseen, prefixes.student)
    after = mean_kl(base, student, target, predictions(base, student, changes))
    assert aside.kl()[1] == pytest.approx(after, rel=1e-3)


def test_unknown_architectures_are_named_with_the_known(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "t.gguf", "gpt2")
    with pytest.raises(SuperegoError, match=r"'gpt2' is not supported .* llama, qwen2, qwen3"):
        Base(read_header(path), torch.float32, resident=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_in_bfloat16_a_prefix_is_computed_in_float32(tmp_path: Path, architecture: str) -> None:
    """Of the same matrices its streams are float32's own; rows have bfloat16's rounding."""
    path = tiny_model(tmp_path / "t.gguf", architecture)
    rough, exact = (
        Base(read_header(path), dtype, resident=True) for dtype in (torch.bfloat16, torch.float32)
    )
    exact.embedding.copy_(exact.embedding.bfloat16())
    rng = np.random.default_rng(9)
    talks = [Conversation(rng.integers(3, 259, 5).tolist(), [7, 8, 9]) for _ in range(6)]
    prefix = rng.integers(3, 259, 30).tolist()
    walks = [Streams(base, Pack(talks, prefix)) for base in (rough, exact)]
    for index in range(exact.shape.n_layer):
        layer = exact.layer(index)
        for matrix in (layer.qkv, layer.gate_up, layer.attn_output.weight, layer.ffn_down.weight):
            assert matrix is not None
            matrix.copy_(matrix.bfloat16())
        for base, streams in zip((rough, exact), walks, strict=True):
            streams.through(base.layer(index))

    def apart(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first - second).norm() / second.norm())

    assert apart(walks[0].prefix, walks[1].prefix) < 1e-5
    assert 1e-4 < apart(walks[0].rows, walks[1].rows) < 0.02


def test_a_row_of_a_prompt_counts_a_third_in_a_fit(tmp_path: Path) -> None:
    base = Base(read_header(tiny_model(tmp_path / "t.gguf")), torch.float32, resident=True)
    talks = [Conversation([10 + i, 20 + i, 30 + i], [40, 50 + i, 60]) for i in range(4)]
    walk = Walk(base, talks, Prefixes([5, 6, 7, 8, 9], [5, 6, 9]), None)
    walk.begin(base.layer(0), {})
    walk.step("attn_output")
    counts = walk.asked().lengths[0].square().view(4, 5)  # five rows each; the third predicts
    assert torch.allclose(counts[:, :2], torch.tensor(0.33), atol=0.01)
    assert torch.allclose(counts[:, 2:], torch.tensor(1.0))

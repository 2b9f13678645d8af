"""The teacher's streams, kept while replies are written, are those that a walk finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from superego.converters.closed_form import solve
from superego.converters.decode import cell_bytes, greedy, prefill
from superego.converters.recorded import Recorded, RecordedStreams, Recording, recorded_bytes
from superego.converters.streams import WRITES, Conversation, Pack, Prefixes, Streams
from superego.converters.transformer import Base
from superego.gguf_file import read_header
from superego.tiny_model import tiny_model

REPLY = 6


def opened(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Base:
    return Base(read_header(tiny_model(folder / "t.gguf", architecture)), dtype, resident=True)


def written(base: Base, prefix: list[int], recorded: Recorded) -> list[Conversation]:
    """Replies to random prompts, some of which end early, in batches of three at most."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 259, n).tolist() for n in (3, 6, 11, 4, 9, 7, 5)]
    cells = prefill(base, prefix, exact=True)
    limits, room = [REPLY] * len(prompts), 3 * 17 * cell_bytes(base.shape, base.dtype)
    plain = greedy(base, prompts, cells, limits, set(), lambda n: None, room)
    recording = recorded.begin([len(p) + REPLY - 1 for p in prompts])
    stop = {plain[0][2], plain[4][3]}
    replies = greedy(base, prompts, cells, limits, stop, lambda n: None, room, recording)
    assert {len(r) for r in replies} > {REPLY}
    talks = [Conversation(*each) for each in zip(prompts, replies, strict=True)]
    recorded.add(talks, recording)
    return talks


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_what_is_recorded_in_writing_are_the_streams_of_a_walk(
    tmp_path: Path, architecture: str
) -> None:
    base = opened(tmp_path, architecture)
    recorded = Recorded(base.shape, 1 << 30)
    prefix = list(range(20, 32))
    talks = written(base, prefix, recorded)
    later = [Conversation([7, 9, 11], [13, 15]), Conversation([8], [10, 12, 14])]
    assert talks[0] in recorded
    assert later[0] not in recorded
    recorded.walk(base, later, prefix)
    pack = Pack([later[0], *talks, later[1]], prefix)
    walked, kept = Streams(base, pack), RecordedStreams(base, pack, recorded)
    for index in range(base.shape.n_layer):
        for write in WRITES:
            for each in (walked, kept):
                each.advance(base.layer(index), write)
            assert 0 < apart(kept.rows, walked.rows) < 1e-3  # float16 has eleven bits
            assert torch.equal(kept.prefix, walked.prefix)


def test_a_fit_to_recorded_streams_is_that_of_a_walk(tmp_path: Path) -> None:
    base = opened(tmp_path)
    recorded = Recorded(base.shape, 1 << 30)
    prefixes = Prefixes([*range(20, 40), 4, 5], [7, 8, 4, 5])
    talks = written(base, prefixes.teacher, recorded)
    ridges = {"attn_output": 0.1, "ffn_down": 0.1}
    for bear in (None, lambda done, n: 4):  # all of them; from the second layer on four
        walked = solve(base, talks, prefixes, 16, ridges, bear=bear)
        kept = solve(base, talks, prefixes, 16, ridges, bear=bear, recorded=recorded)
        for key, change in walked.items():
            assert apart(kept[key].b @ kept[key].a, change.b @ change.a) < 0.01
    with pytest.raises(KeyError):
        solve(base, [Conversation([7], [9])], prefixes, 16, ridges, recorded=recorded)


def test_in_bfloat16_the_exact_cells_of_a_prefix_are_those_of_a_walk(tmp_path: Path) -> None:
    base, prefix = opened(tmp_path, dtype=torch.bfloat16), list(range(20, 50))
    streams = Streams(base, Pack([Conversation([7], [9])], prefix))
    rough, exact = prefill(base, prefix), prefill(base, prefix, exact=True)
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        _, cells = streams.prefix_inputs(layer, "attn_output")
        assert cells is not None
        assert torch.equal(exact[index].value, cells.value)
        assert exact[index].key.dtype == torch.bfloat16
        streams.through(layer)
    assert not torch.equal(rough[-1].value, exact[-1].value)


def test_streams_beyond_float16_are_kept_as_long_as_it_knows(tmp_path: Path) -> None:
    shape = opened(tmp_path).shape
    recording = Recording(shape, [2])
    stream = torch.full((1, shape.d_model), 1e6)
    recording.put(0, "ffn_down", torch.tensor([1]), stream)
    assert torch.equal(recording.get(0, "ffn_down", torch.tensor([1])), stream.clamp(max=65504))


def test_there_is_room_for_as_many_rows_as_memory_was_given(tmp_path: Path) -> None:
    shape = opened(tmp_path).shape
    recorded = Recorded(shape, recorded_bytes(shape, 10))
    assert recorded.has_room(10)
    assert not recorded.has_room(11)
    recording = recorded.begin([4, 3])
    assert sum(each.nbytes for each in recording._streams.values()) == recorded_bytes(shape, 7)
    assert recorded.has_room(3)
    assert not recorded.has_room(4)

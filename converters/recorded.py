"""The teacher's residual streams of references, kept from when these were written.

Knows rows and where they lie. Does not know replies, nor what is fitted to the streams. Half of the
products of a fit are the teacher's walk, which writing has made already: with it kept there is time
for half as many references again, for 2 · n_layer · d_model · 2 bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from superego.converters.shape import Shape
from superego.converters.streams import WRITES, Conversation, Pack, Streams
from superego.converters.transformer import Base, Layer

_WIDEST = torch.finfo(torch.float16).max


class Recording:
    """Streams behind each residual write of some conversations, (rows, d_model) in float16.

    Those of conversation i begin in row `starts[i]`.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int]) -> None:
        """`lengths`: rows of each conversation, at most."""
        self.starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        size = sum(lengths), shape.d_model
        self._streams = {
            (layer, write): torch.empty(size, dtype=torch.float16)
            for layer in range(shape.n_layer)
            for write in WRITES
        }

    def put(self, layer: int, write: str, rows: torch.Tensor, stream: torch.Tensor) -> None:
        """Keep a stream (n, d_model) as it is behind this write, for the rows (n,)."""
        # sinks may be longer than float16 knows; what is kept of them is long enough
        kept = stream.clamp(-_WIDEST, _WIDEST).half()
        self._streams[layer, write].index_copy_(0, rows, kept)

    def get(self, layer: int, write: str, rows: torch.Tensor) -> torch.Tensor:
        """What was put there, (n, d_model) float32."""
        return self._streams[layer, write].index_select(0, rows).float()


class Recorded:
    """Recordings of all references that were written or walked, within so many bytes."""

    def __init__(self, shape: Shape, room: int) -> None:
        self._shape, self._left = shape, room
        self._found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Recording, int]] = {}

    def has_room(self, rows: int) -> bool:
        """Whether that many rows more may be kept."""
        return recorded_bytes(self._shape, rows) <= self._left

    def begin(self, lengths: Sequence[int]) -> Recording:
        """A new recording, of conversations of so many rows at most."""
        self._left -= recorded_bytes(self._shape, sum(lengths))
        return Recording(self._shape, lengths)

    def add(self, conversations: Sequence[Conversation], recording: Recording) -> None:
        """These are the conversations of a recording, in its order."""
        for each, start in zip(conversations, recording.starts.tolist(), strict=True):
            self._found[_key(each)] = recording, start

    def __contains__(self, conversation: Conversation) -> bool:
        return _key(conversation) in self._found

    def walk(self, base: Base, conversations: Sequence[Conversation], prefix: list[int]) -> None:
        """Record conversations that were not written here, behind the teacher's prefix."""
        pack = Pack(conversations, prefix)
        streams, recording = Streams(base, pack), self.begin(pack.rows.lengths)
        everything = torch.arange(pack.rows.total)
        for index in range(base.shape.n_layer):
            for write in WRITES:
                streams.advance(base.layer(index), write)
                recording.put(index, write, everything, streams.rows)
        self.add(pack.conversations, recording)

    def places(self, conversations: Sequence[Conversation]) -> list[Place]:
        """Where the rows of these conversations, one behind the other, are to be found."""
        parts: dict[int, tuple[Recording, list[torch.Tensor], list[torch.Tensor]]] = {}
        done = 0
        for each in conversations:
            recording, start = self._found[_key(each)]
            n = len(each.prompt) + len(each.reply) - 1
            _, here, there = parts.setdefault(id(recording), (recording, [], []))
            here.append(torch.arange(done, done + n))
            there.append(torch.arange(start, start + n))
            done += n
        return [(kept, torch.cat(here), torch.cat(there)) for kept, here, there in parts.values()]

    def clear(self) -> None:
        """Let go of everything."""
        self._found.clear()


# a recording, rows of a pack, and where they lie in the recording
Place = tuple[Recording, torch.Tensor, torch.Tensor]


class RecordedStreams(Streams):
    """Streams of recorded conversations: only their prefix is walked."""

    def __init__(self, base: Base, pack: Pack, recorded: Recorded) -> None:
        """Raises KeyError for a conversation that was not recorded."""
        super().__init__(base, pack)
        self._recorded = recorded
        self._places = recorded.places(pack.conversations)

    def narrow(self, kept: Sequence[int]) -> None:
        super().narrow(kept)
        self._places = self._recorded.places(self.pack.conversations)

    def advance(self, layer: Layer, write: str) -> None:
        inputs, _ = self.prefix_inputs(layer, write)
        self.prefix += getattr(layer, write)(inputs)
        for recording, here, there in self._places:
            self.rows.index_copy_(0, here, recording.get(layer.index, write, there))


def recorded_bytes(shape: Shape, rows: int) -> int:
    """Bytes of so many recorded rows."""
    return len(WRITES) * shape.n_layer * shape.d_model * torch.float16.itemsize * rows


def _key(conversation: Conversation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(conversation.prompt), tuple(conversation.reply)

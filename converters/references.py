"""Reference conversations: seed messages answered by the teacher itself, cached in blocks.

Knows seeds, rendering and the cache. Does not know what is solved from them. On-policy
answers matter: other people's answers give a far worse adapter.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch

import superego
from superego.atomic import replacing
from superego.base import BaseModel
from superego.converters.decode import ROOM, batches, cell_bytes, greedy, prefill
from superego.converters.products import has_light
from superego.converters.streams import Conversation, Prefixes
from superego.converters.transformer import Base
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.runtime import stop_tokens
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

# Replies are written a block at a time, whatever the effort: a block is the same whether
# it is the only one or one of many, so that the cache never changes a result. Larger
# blocks write faster; the first one is what `quick` waits for.
BLOCKS = (12, 20, 76, 132, 96, 132, 132, 264, *[384] * 8)
# Tokens of a reply, at most. Fewer say little of what changes as a reply goes on; with more there
# is time for fewer prompts, which teach more than more tokens of the same.
REPLY = 32
_KNOWN = 24  # messages that every compile knows


@dataclass(frozen=True)
class Prompts:
    """Reference messages as tokens, behind the teacher's and the student's prefix."""

    prefixes: Prefixes
    rest: list[list[int]]


def seeds(seed: int) -> list[str]:
    """The bundled user messages, in the order that `seed` gives (0: as they are)."""
    text = importlib.resources.files("superego.converters").joinpath("seeds.txt")
    lines = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
    if seed:
        random.Random(seed).shuffle(lines)
    return lines


def blocks_of(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """The prompts in the blocks that they are answered in."""
    ends = itertools.accumulate(BLOCKS)
    found = [list(prompts[end - size : end]) for size, end in zip(BLOCKS, ends, strict=True)]
    return [block for block in found if block]


def prepare(llm: Llama, base: BaseModel, manifesto: Manifesto, messages: list[str]) -> Prompts:
    """Render the messages both ways; they must differ in the prefix alone.

    Raises SuperegoError where the manifesto does not fit the context.
    """
    template = ChatTemplate(base.header)
    teacher = encode(llm, template, manifesto.body, messages)
    student = encode(llm, template, None, messages)
    longest = max(len(r) for r in teacher.rest) + REPLY
    if base.context_length and len(teacher.prefix) + longest > base.context_length:
        raise SuperegoError(
            f"manifesto '{manifesto.name}' is {len(teacher.prefix):,} tokens as this model reads "
            f"it; with {longest} for a conversation that exceeds the model's context of "
            f"{base.context_length:,}; shorten the manifesto"
        )
    # Where the border merges differently (SentencePiece puts a space in front of what follows
    # a special token) the teacher reads the message as the student has it.
    rest = [s for t, s in zip(teacher.rest, student.rest, strict=True) if _alike(t, s)]
    if len(rest) < 0.9 * len(messages):
        raise SuperegoError(
            f"{base.path}: its chat template renders user messages differently behind a system "
            "message; Superego cannot match the two"
        )
    if not student.prefix:
        raise SuperegoError("the chat template puts nothing in front of a user message")
    known = encode(llm, template, _sample(), [])
    shared = encode(llm, template, None, seeds(0)[:_KNOWN]).rest
    return Prompts(Prefixes(teacher.prefix, student.prefix, known.prefix, shared), rest)


def _sample() -> str:
    """The manifesto that every compile knows."""
    file = importlib.resources.files("superego.converters").joinpath("sample.txt")
    return file.read_text("utf-8").strip()


def _alike(first: list[int], second: list[int]) -> bool:
    """Whether two texts are the same tokens, or differ in the first two at most."""
    end = min(len(first), len(second), max(len(first), len(second)) - 2)
    return first == second or (end > 0 and first[-end:] == second[-end:])


def cache_folder() -> Path:
    """Where written references are kept."""
    return Path(platformdirs.user_cache_dir("superego")) / "references"


def write_replies(
    llm: Llama,
    base: Base,
    base_fingerprint: str,
    prompts: Prompts,
    n_blocks: int,
    use_cache: bool,
    progress: Callable[[int, int], None],
    room: int = ROOM,
    before: Sequence[Conversation] = (),
) -> tuple[list[Conversation], int]:
    """The first `n_blocks` blocks of prompts with the teacher's greedy replies.

    Returns the conversations in the order of the prompts and how many came from the cache.
    `room` is what their keys and values may take at once, in bytes; `before` are those of the
    first blocks, where they are there already.
    """
    stop = stop_tokens(llm)
    conversations: list[Conversation] = []
    cached = done = 0
    ends = list(itertools.accumulate(BLOCKS[:n_blocks]))
    blocks = [
        block
        for size, end in zip(BLOCKS, ends, strict=False)
        if (block := prompts.rest[end - size : end])
    ]
    total = REPLY * sum(map(len, blocks))
    prefix = None
    for block in blocks:
        behind = len(conversations) + len(block)
        if behind <= len(before):
            conversations += before[len(conversations) : behind]
            done += REPLY * len(block)
            continue
        limits = [REPLY] * len(block)
        order = sorted(range(len(block)), key=lambda i: (len(block[i]), i))
        # how many are written at once decides which sums are rounded how
        sizes = batches(
            [block[i] for i in order],
            [limits[i] for i in order],
            room // cell_bytes(base.shape, base.dtype),
        )
        key = _key(base, base_fingerprint, prompts.prefixes, block, sizes)
        path = cache_folder() / f"{key}.json"
        replies = _read(path, len(block), base.shape.n_vocab) if use_cache else None
        if replies is not None:
            cached += len(block)
        else:
            if prefix is None:
                prefix = prefill(base, prompts.prefixes.teacher)
            start = done

            def told(tokens: int, start: int = start) -> None:
                progress(start + tokens, total)

            written = greedy(
                base,
                [block[i] for i in order],
                prefix,
                [limits[i] for i in order],
                stop,
                told,
                room,
            )
            replies = [r for _, r in sorted(zip(order, written, strict=True))]
            if use_cache:
                _store(path, replies)
        done += REPLY * len(block)
        progress(done, total)
        conversations += [Conversation(p, r) for p, r in zip(block, replies, strict=True)]
    base.let_go_of_light()
    return conversations, cached


def _key(
    base: Base,
    fingerprint: str,
    prefixes: Prefixes,
    block: list[list[int]],
    sizes: list[int],
) -> str:
    parts: list[object] = [
        superego.__version__,
        torch.__version__,
        fingerprint,
        [str(base.dtype), has_light(base.dtype, base.device)],
        REPLY,
        prefixes.teacher,
        block,
    ]
    if len(sizes) > 1:
        parts.append(sizes)
    if base.device.type != "cpu":
        parts.append(base.device.type)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _read(path: Path, n: int, n_vocab: int) -> list[list[int]] | None:
    """A cached block, or None where there is none or it is damaged."""
    try:
        replies = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    whole = (
        isinstance(replies, list)
        and len(replies) == n
        and all(
            isinstance(r, list) and r and all(type(t) is int and 0 <= t < n_vocab for t in r)
            for r in replies
        )
    )
    return replies if whole else None


def _store(path: Path, replies: list[list[int]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(replies))
    except (OSError, SuperegoError):
        return  # a cache that cannot be written costs time, not the result

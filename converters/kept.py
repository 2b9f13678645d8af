"""References kept from one manifesto to the next, where the new teacher would say the same.

Knows an old teacher's replies and their likelihood under a new one. Does not know why the
manifesto changed. A reply is kept by how likely it is now, never by who wrote it, so that
nothing piles up over many amendments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from superego.base import BaseModel
from superego.converters.decode import greedy, prefill
from superego.converters.references import BLOCKS, REPLY, Prompts
from superego.converters.streams import Conversation, Pack, predictions
from superego.converters.transformer import Base
from superego.exchanges import pack_references
from superego.runtime import stop_tokens

if TYPE_CHECKING:
    from llama_cpp import Llama

# How much less likely than the likeliest ones a kept reply's tokens may be, nats a token. On
# two amendments it kept 63 and 64 of 64; 0.02 kept 54 and 58 and recovered 0.014 less on both.
REGRET = 0.05
_CHUNK = 1024  # rows whose full logits lie in memory together


# Replies that an earlier teacher wrote: prompt -> reply, tokens behind the prefix
Known = Mapping[tuple[int, ...], list[int]]


def stored(model: BaseModel, conversations: Sequence[Conversation]) -> str:
    """The conversations in the form that an adapter file keeps them."""
    return pack_references(model.header, [(c.prompt, c.reply) for c in conversations])


def regrets(
    base: Base, prefix: list[int], conversations: Sequence[Conversation]
) -> list[tuple[float, int]]:
    """For every conversation: its reply's regret behind `prefix`, and where it leaves greedy.

    Regret is the mean over reply tokens of log p(likeliest) - log p(written), nats; the
    second number counts the reply's leading tokens that are the likeliest ones.
    """
    pack = Pack(conversations, prefix)
    streams = predictions(base, pack)
    written = torch.tensor([t for c in pack.conversations for t in c.reply])
    gaps = []
    for start in range(0, len(streams), _CHUNK):
        part = slice(start, start + _CHUNK)
        logits = base.logits(streams[part])  # compared in their own type: a copy costs more
        own = logits.gather(1, written[part, None])[:, 0]
        gaps.append(logits.amax(-1).float() - own.float())
    found = {}
    parts = torch.cat(gaps).split([len(c.reply) for c in pack.conversations])
    for conversation, gap in zip(pack.conversations, parts, strict=True):
        missed = gap.nonzero()
        agreed = int(missed[0, 0]) if len(missed) else len(gap)
        found[id(conversation)] = float(gap.mean()), agreed
    return [found[id(c)] for c in conversations]


def renew(
    llm: Llama,
    base: Base,
    prompts: Prompts,
    known: Known,
    n_blocks: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Conversation], int]:
    """Replies to the first blocks of prompts: known ones that still hold, the rest written.

    What is written goes on from where the known reply leaves the teacher's greedy one.
    Returns the conversations in the order of the prompts and how many replies were kept.
    """
    wanted = prompts.rest[: sum(BLOCKS[:n_blocks])]
    replies: list[list[int]] = [list(known.get(tuple(p), [])) for p in wanted]
    total = REPLY * len(wanted)
    there = [i for i, reply in enumerate(replies) if reply]
    kept: set[int] = set()
    if there:
        old = [Conversation(wanted[i], replies[i]) for i in there]
        checked = regrets(base, prompts.prefixes.teacher, old)
        for i, (regret, agreed) in zip(there, checked, strict=True):
            if regret <= REGRET:
                kept.add(i)
            else:
                replies[i] = replies[i][: min(agreed, REPLY - 1)]
    done = REPLY * len(kept)
    progress(done, total)
    todo = [i for i in range(len(wanted)) if i not in kept]
    if todo:
        fronts = {i: wanted[i] + replies[i] for i in todo}
        todo.sort(key=lambda i: (len(fronts[i]), i))
        written = greedy(
            base,
            [fronts[i] for i in todo],
            prefill(base, prompts.prefixes.teacher),
            [REPLY - len(replies[i]) for i in todo],
            stop_tokens(llm),
            lambda tokens: progress(min(done + tokens, total), total),
        )
        for i, rest in zip(todo, written, strict=True):
            replies[i] = replies[i] + rest
        base.let_go_of_light()
    progress(total, total)
    return [Conversation(p, r) for p, r in zip(wanted, replies, strict=True)], len(kept)

"""What a report shows: replies side by side, KL by prompt, position and token, costs, settings.

Knows what is measured for a page. Does not know how it looks.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import superego
from superego.adapter import Adapter, same_weights
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.evaluate import Cost, Report, Trace, bundled, evaluate, run_cost
from superego.history import manifesto_of
from superego.logits import ParallelContext
from superego.runtime import default_threads, load, stop_tokens
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

BARE, SYSTEM, ADAPTER = "bare base", "system message", "adapter"
WAYS = (BARE, SYSTEM, ADAPTER)
PROMPTS = 32  # held-out ones, where the user gives none
_ASKED = 4  # questions of which the replies are shown, where the user gives none
_REPLY = 72  # tokens of a shown reply
_TIMED = 4  # messages that are timed
_END = "⏹"  # shown for a token that ends the reply
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Reply:
    """A greedy reply; `cut` where it did not end by itself."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Exchange:
    """A question and what each way replies to it."""

    question: str
    replies: dict[str, Reply]  # by way


@dataclass(frozen=True)
class Token:
    """A piece of the teacher's reply, and how far the others are from the teacher there, nats."""

    text: str
    kl_adapter: float
    kl_base: float


@dataclass(frozen=True)
class Heat:
    """One of the teacher's replies, token by token."""

    which: str
    question: str
    tokens: list[Token]


@dataclass(frozen=True)
class Positions:
    """Mean KL at each position of a reply, over the replies that are as long; all one length."""

    base: list[float]
    adapter: list[float]
    replies: list[int]  # how many are as long


@dataclass(frozen=True)
class PersonaReport:
    """All that is shown of one adapter. KL in nats a token."""

    name: str
    file: str
    scale: float
    manifesto: str
    measures: Report
    prompts: list[str]
    kl_base: list[float]  # by prompt
    kl_adapter: list[float]
    positions: Positions
    heat: list[Heat]
    exchanges: list[Exchange]
    costs: dict[str, Cost]  # by way
    settings: dict[str, Any]
    same_base: bool | None  # was it made from this very file? None: it does not say


def gather(
    base: BaseModel,
    personas: Sequence[tuple[Adapter, float]],
    prompts: Sequence[str] | None = None,
    asks: Sequence[str] = (),
    max_tokens: int = 48,
    threads: int | None = None,
    progress: Progress = lambda label, done, total: None,
) -> list[PersonaReport]:
    """Measure every persona beside its own manifesto as system message; raises SuperegoError.

    `prompts` are measured on (32 of the held-out ones by default), `asks` are answered side by
    side (some of the prompts by default).
    """
    manifestos = [manifesto_of(adapter).body for adapter, _ in personas]
    prompts = _spread(bundled("heldout"), PROMPTS) if prompts is None else list(prompts)
    asks = list(asks) or _spread(prompts, _ASKED)
    template = ChatTemplate(base.header)
    vocabulary = load(base, vocab_only=True, n_ctx=256)
    encoded = [encode(vocabulary, template, m, [*asks, *prompts[:_TIMED]]) for m in manifestos]
    need = max(len(e.prefix) + max(map(len, e.rest)) for e in encoded) + _REPLY
    if base.context_length and need > base.context_length:
        raise SuperegoError(
            f"manifesto, question and reply have {need} tokens and do not fit the model's "
            f"context of {base.context_length}; ask something shorter"
        )
    found = []
    llm = load(base, need, threads)
    bare = _replies(llm, template, None, [], asks)
    run_cost(llm, template, None, prompts[:1])  # brings the weights into memory
    bare_cost = run_cost(llm, template, None, prompts[:_TIMED])
    for (adapter, scale), manifesto in zip(personas, manifestos, strict=True):
        progress(f"asking {adapter.name}", 0, 2)
        system = _replies(llm, template, manifesto, [], asks)
        progress(f"asking {adapter.name}", 1, 2)
        own = _replies(llm, template, None, [(adapter, scale)], asks)
        progress(f"asking {adapter.name}", 2, 2)
        costs = {BARE: bare_cost, SYSTEM: run_cost(llm, template, manifesto, prompts[:_TIMED])}
        with superego.attach(llm, adapter.path, scale):
            costs[ADAPTER] = run_cost(llm, template, None, prompts[:_TIMED])

        def measured(done: int, total: int, name: str = adapter.name) -> None:
            progress(f"measuring {name}", done, total)

        trace = Trace()
        (measures,) = evaluate(
            base, manifesto, [(adapter, scale)], prompts, max_tokens, threads, measured, trace=trace
        )
        far, near = trace.kl["0", -1], trace.kl["S", 0]
        found.append(
            PersonaReport(
                name=adapter.name,
                file=adapter.path.name,
                scale=scale,
                manifesto=manifesto,
                measures=measures,
                prompts=list(prompts),
                kl_base=[float(each.mean()) for each in far],
                kl_adapter=[float(each.mean()) for each in near],
                positions=_positions(far, near),
                heat=_heat(llm, trace),
                exchanges=[
                    Exchange(ask, dict(zip(WAYS, row, strict=True)))
                    for ask, *row in zip(asks, bare, system, own, strict=True)
                ],
                costs=costs,
                settings=_settings(base, adapter, scale, measures, threads),
                same_base=same_weights(adapter, base),
            )
        )
    return found


def _spread(texts: Sequence[str], n: int) -> list[str]:
    """At most `n` of the texts, evenly spread."""
    return [texts[i * len(texts) // n] for i in range(n)] if len(texts) > n else list(texts)


def _replies(
    llm: Llama,
    template: ChatTemplate,
    system: str | None,
    attached: Sequence[tuple[Adapter, float]],
    messages: Sequence[str],
) -> list[Reply]:
    encoded = encode(llm, template, system, messages)
    widest = max(map(len, encoded.rest)) + _REPLY
    stop = stop_tokens(llm)
    out: list[Reply] = []
    group = 8  # sequences whose full logits lie in memory together
    for start in range(0, len(messages), group):
        part = encoded.rest[start : start + group]
        with ParallelContext(llm, encoded.prefix, len(part), widest, attached) as context:
            tokens, _ = context.greedy(part, _REPLY, stop)
        for reply in tokens:
            text = llm.detokenize([t for t in reply if t not in stop]).decode("utf-8", "replace")
            out.append(Reply(text.strip(), reply[-1] not in stop))
    return out


def _positions(far: Sequence[np.ndarray], near: Sequence[np.ndarray]) -> Positions:
    """From the KL of every token of every reply."""
    reach = [
        [i for i, each in enumerate(near) if len(each) > position]
        for position in range(max(map(len, near)))
    ]

    def mean(of: Sequence[np.ndarray]) -> list[float]:
        return [float(np.mean([of[i][p] for i in rows])) for p, rows in enumerate(reach)]

    return Positions(mean(far), mean(near), [len(rows) for rows in reach])


def _heat(llm: Llama, trace: Trace) -> list[Heat]:
    """The reply whose mean KL is the median one, and the one with the highest."""
    near, far = trace.kl["S", 0], trace.kl["0", -1]
    order = sorted(range(len(near)), key=lambda i: float(near[i].mean()))
    chosen = {"median": order[(len(order) - 1) // 2], "highest": order[-1]}
    if len(order) == 1:
        del chosen["highest"]
    return [
        Heat(which, trace.messages[i], _tokens(llm, trace.replies[i], near[i], far[i]))
        for which, i in chosen.items()
    ]


def _tokens(llm: Llama, reply: Sequence[int], near: np.ndarray, far: np.ndarray) -> list[Token]:
    """Pieces of text with their KL; tokens that end inside a character join the next."""
    stop, out, held, highest = stop_tokens(llm), [], b"", (0.0, 0.0)
    for token, adapter, base in zip(reply, near, far, strict=True):
        held += _END.encode() if token in stop else llm.detokenize([token], special=False)
        highest = (max(highest[0], float(adapter)), max(highest[1], float(base)))
        try:
            text = held.decode("utf-8")
        except UnicodeDecodeError:
            continue
        out.append(Token(text, *highest))
        held, highest = b"", (0.0, 0.0)
    if held:
        out.append(Token(held.decode("utf-8", "replace"), *highest))
    return out


def _settings(
    base: BaseModel, adapter: Adapter, scale: float, measures: Report, threads: int | None
) -> dict[str, Any]:
    """What somebody needs who wants the same figures."""
    import llama_cpp

    own = adapter.own
    rows: dict[str, Any] = {
        "base": f"{base.name} ({base.path.name}, {base.header.size / 1e6:.0f} MB)",
        "base fingerprint": base.fingerprint,
        "manifesto SHA-256": own.get("manifesto.sha256", "not stored"),
        "method": own.get("method", "not stored"),
    }
    try:
        compiled = json.loads(str(own.get("settings", "{}")))
    except ValueError:
        compiled = {"settings": own["settings"]}  # whatever another program wrote there
    if isinstance(compiled, dict):
        rows |= {f"compile: {key.replace('_', ' ')}": value for key, value in compiled.items()}
    rows |= {
        "scale": scale,
        "matrices": len(adapter.pairs),
        "largest rank": adapter.rank,
        "made by superego": own.get("version", "not stored"),
        "measured on": f"{measures.prompts} prompts, {measures.tokens:,} tokens of replies",
        "threads": threads or default_threads(),
        "runtime": f"llama-cpp-python {llama_cpp.__version__}, superego {superego.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    return rows

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
from superego.logits import ParallelContext
from superego.runtime import default_threads, load, stop_tokens
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

WAYS = ("bare base", "system message", "adapter")
PROMPTS = 32  # held-out ones, where the user gives none
_ASKED = 4  # questions of which the replies are shown, where the user gives none
_REPLY = 72  # tokens of a shown reply
_TIMED = 4  # messages that are timed
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Token:
    """A piece of the teacher's reply and what the others would have made of it, nats."""

    text: str
    kl_adapter: float
    kl_base: float


@dataclass(frozen=True)
class PersonaReport:
    """All that is shown of one adapter."""

    name: str
    file: str
    scale: float
    manifesto: str
    measures: Report
    messages: list[str]
    kl_base: list[float]  # by prompt
    kl_adapter: list[float]
    position_base: list[float]  # by position in the reply, mean over the replies that reach it
    position_adapter: list[float]
    position_count: list[int]
    heat: list[tuple[str, str, list[Token]]]  # (which, user message, the teacher's reply)
    replies: list[tuple[str, dict[str, tuple[str, bool]]]]  # way -> (reply, cut off)
    costs: dict[str, Cost]
    settings: dict[str, Any]
    exact_base: bool | None  # was it made from this very file?


def read_manifesto_of(adapter: Adapter) -> str:
    """The manifesto in an adapter; raises SuperegoError where it holds none."""
    found = adapter.own.get("manifesto")
    if not isinstance(found, str) or not found.strip():
        raise SuperegoError(
            f"{adapter.path}: holds no superego.manifesto to compare with; a report needs an "
            "adapter that superego made"
        )
    return found


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
    manifestos = [read_manifesto_of(adapter) for adapter, _ in personas]
    if prompts is None:
        held_out = bundled("heldout")
        prompts = held_out[:: max(1, len(held_out) // PROMPTS)][:PROMPTS]
    shown = list(asks) or list(prompts[:: max(1, len(prompts) // _ASKED)][:_ASKED])
    found = []
    for (adapter, scale), manifesto in zip(personas, manifestos, strict=True):
        label = f"measuring {adapter.name}"
        trace = Trace()

        def show(done: int, total: int, label: str = label) -> None:
            progress(label, done, total)

        (measures,) = evaluate(
            base, manifesto, [(adapter, scale)], prompts, max_tokens, threads, show, trace=trace
        )
        found.append(
            _describe(base, adapter, scale, manifesto, measures, trace, shown, threads, progress)
        )
    return found


def _describe(
    base: BaseModel,
    adapter: Adapter,
    scale: float,
    manifesto: str,
    measures: Report,
    trace: Trace,
    shown: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> PersonaReport:
    template = ChatTemplate(base.header)
    small = load(base, n_ctx=256, threads=threads)
    longest = [*shown, *trace.messages[:_TIMED]]
    encoded = encode(small, template, manifesto, longest)
    need = len(encoded.prefix) + max(map(len, encoded.rest)) + _REPLY
    if base.context_length and need > base.context_length:
        raise SuperegoError(
            f"manifesto, question and reply have {need} tokens and do not fit the model's "
            f"context of {base.context_length}; ask something shorter"
        )
    label = f"asking {adapter.name}"
    replies: list[dict[str, tuple[str, bool]]] = [{} for _ in shown]
    for i, way in enumerate(WAYS):
        progress(label, i, len(WAYS))
        system = manifesto if way == "system message" else None
        attached = [(adapter, scale)] if way == "adapter" else []
        for slot, reply in enumerate(_replies(small, template, system, attached, shown)):
            replies[slot][way] = reply
    progress(label, len(WAYS), len(WAYS))
    llm = load(base, n_ctx=need, threads=threads)
    timed = trace.messages[:_TIMED]
    run_cost(llm, template, None, timed[:1])  # warms the model's pages
    costs = {"bare base": run_cost(llm, template, None, timed)}
    costs["system message"] = run_cost(llm, template, manifesto, timed)
    with superego.attach(llm, adapter.path, scale):
        costs["adapter"] = run_cost(llm, template, None, timed)
    bare, own = trace.kl["0", -1], trace.kl["S", 0]
    widest = max(map(len, own))
    reach = [[i for i, each in enumerate(own) if len(each) > p] for p in range(widest)]
    return PersonaReport(
        name=adapter.name,
        file=adapter.path.name,
        scale=scale,
        manifesto=manifesto,
        measures=measures,
        messages=trace.messages,
        kl_base=[float(each.mean()) for each in bare],
        kl_adapter=[float(each.mean()) for each in own],
        position_base=[float(np.mean([bare[i][p] for i in rows])) for p, rows in enumerate(reach)],
        position_adapter=[
            float(np.mean([own[i][p] for i in rows])) for p, rows in enumerate(reach)
        ],
        position_count=[len(rows) for rows in reach],
        heat=_heat(small, trace),
        replies=list(zip(shown, replies, strict=True)),
        costs=costs,
        settings=_settings(base, adapter, scale, measures, threads),
        exact_base=same_weights(adapter, base),
    )


def _replies(
    llm: Llama,
    template: ChatTemplate,
    system: str | None,
    attached: Sequence[tuple[Adapter, float]],
    messages: Sequence[str],
) -> list[tuple[str, bool]]:
    """Greedy replies, and whether each was cut off."""
    encoded = encode(llm, template, system, messages)
    widest = max(map(len, encoded.rest)) + _REPLY
    stop = stop_tokens(llm)
    out: list[tuple[str, bool]] = []
    for start in range(0, len(messages), 8):
        part = encoded.rest[start : start + 8]
        with ParallelContext(llm, encoded.prefix, len(part), widest, attached) as context:
            tokens, _ = context.greedy(part, _REPLY, stop)
        for reply in tokens:
            text = llm.detokenize([t for t in reply if t not in stop]).decode("utf-8", "replace")
            out.append((text.strip(), reply[-1] not in stop))
    return out


def _heat(llm: Llama, trace: Trace) -> list[tuple[str, str, list[Token]]]:
    """The replies in which the adapter is nearest to the median, and farthest from its teacher."""
    own, bare = trace.kl["S", 0], trace.kl["0", -1]
    order = sorted(range(len(own)), key=lambda i: float(own[i].mean()))
    chosen = {"the median reply": order[(len(order) - 1) // 2], "the worst reply": order[-1]}
    if len(order) == 1:
        chosen.pop("the worst reply")
    return [
        (which, trace.messages[i], _tokens(llm, trace.replies[i], own[i], bare[i]))
        for which, i in chosen.items()
    ]


def _tokens(llm: Llama, reply: list[int], own: np.ndarray, bare: np.ndarray) -> list[Token]:
    """Pieces of text with their KL; tokens that end inside a character join the next."""
    stop, out, held, kls = stop_tokens(llm), [], b"", (0.0, 0.0)
    for token, adapter, base in zip(reply, own, bare, strict=True):
        held += b"\xe2\x8f\xb9" if token in stop else llm.detokenize([token], special=False)
        kls = (max(kls[0], float(adapter)), max(kls[1], float(base)))
        try:
            text = held.decode("utf-8")
        except UnicodeDecodeError:
            continue
        out.append(Token(text, *kls))
        held, kls = b"", (0.0, 0.0)
    if held:
        out.append(Token(held.decode("utf-8", "replace"), *kls))
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
        compiled = {"settings": own.get("settings")}
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

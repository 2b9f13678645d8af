"""How much of a manifesto's effect an adapter recovers, measured in llama.cpp.

Knows the measures and their formulas. Does not know how an adapter was made. T is the
base with the manifesto as system message, 0 the bare base, S the base with the adapter;
all three run on one quantized file.
"""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from superego.base import BaseModel
from superego.dialogue import Encoded, encode
from superego.errors import SuperegoError
from superego.logits import ParallelContext
from superego.persona import Persona
from superego.runtime import load, stop_tokens, tokenize
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

_GROUP = 8  # prompts read at once; their full logits lie in memory together
_RESAMPLES = 2000
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """The measures of one adapter. KL in nats a token."""

    adapter: str
    kl_recovered: Interval  # 1 - KL(T‖S) / KL(T‖0)
    kl_base: float  # KL(T‖0)
    kl_adapter: float  # KL(T‖S)
    top1_base: float  # share of tokens where 0 would choose T's token
    top1_adapter: float
    drift_adapter: float  # KL(0‖S) after neutral text
    drift_system: float  # KL(0‖T) after the same
    kl_with_system: float  # KL(T‖S + system message): context return
    top1_with_system: float
    specificity: float | None  # recovered minus what another persona's adapter recovers
    prompts: int
    tokens: int
    prompt_tokens_saved: int
    adapter_bytes: int
    recovered_by_prompt: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class Trace:
    """What the measures are means of; `evaluate` fills one where it is given.

    `kl` holds an array (tokens of the reply) for each prompt, nats, under ("0", -1) for the
    bare base, ("S", i) for adapter i and ("TS", i) for it behind the system message.
    """

    messages: list[str] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)  # T's own, stop token included
    kl: dict[tuple[str, int], list[np.ndarray]] = field(default_factory=dict)


def bundled(name: str) -> list[str]:
    """The lines of a bundled text: `heldout` or `neutral`."""
    text = importlib.resources.files("superego").joinpath(f"{name}.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax of (n, n_vocab) float32, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) of rows of log-probabilities, nats."""
    return (np.exp(p) * (p - q)).sum(axis=-1)


def recovered(kl_base: np.ndarray, kl_adapter: np.ndarray, seed: int = 0) -> Interval:
    """1 - mean / mean over prompts, with a percentile bootstrap over prompts."""
    draws = np.random.default_rng(seed).integers(0, len(kl_base), (_RESAMPLES, len(kl_base)))
    samples = 1 - kl_adapter[draws].mean(axis=1) / kl_base[draws].mean(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(1 - kl_adapter.mean() / kl_base.mean()), float(low), float(high))


def evaluate(
    base: BaseModel,
    manifesto: str,
    adapters: Sequence[tuple[Persona, float]],
    prompts: Sequence[str] | None = None,
    max_tokens: int = 48,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
    foreign: tuple[Persona, float] | None = None,
    trace: Trace | None = None,
) -> list[Report]:
    """Measure adapters beside the manifesto as system message; raises SuperegoError.

    `prompts` default to the bundled held-out ones. T's greedy replies of at most
    `max_tokens` tokens are what all three read. `foreign` is another persona's adapter,
    measured against the same manifesto for specificity. `trace` is filled with the values of
    every token.
    """
    messages = list(prompts) if prompts is not None else bundled("heldout")
    if not messages:
        raise SuperegoError("no prompts to evaluate on")
    template = ChatTemplate(base.header)
    llm = load(base, n_ctx=256, threads=threads)
    teacher = encode(llm, template, manifesto, messages)
    student = encode(llm, template, None, messages)
    widest = max(len(r) for e in (teacher, student) for r in e.rest) + max_tokens
    if base.context_length and len(teacher.prefix) + widest > base.context_length:
        raise SuperegoError(
            f"manifesto of {len(teacher.prefix)} tokens and prompts of up to {widest} do not "
            f"fit the model's context of {base.context_length}"
        )
    with Drift(llm, base, adapters) as drift:
        drifts = [drift.of(_one_hot(i, adapters)) for i in range(len(adapters))]
        drift_system = drift.of_system(teacher)
    everyone = [*adapters, *([foreign] if foreign else [])]
    trace = trace or Trace()
    trace.messages = messages
    rows = _compare(
        llm, teacher, student, everyone, len(adapters), max_tokens, widest, progress, trace
    )
    other = recovered(rows["kl_0"][0], rows["kl_S"][-1]).value if foreign else None
    saved = len(teacher.prefix) - len(student.prefix)
    reports = []
    for i, (adapter, scale) in enumerate(adapters):
        base_kl, own_kl = rows["kl_0"][0], rows["kl_S"][i]
        reports.append(
            Report(
                adapter=f"{adapter.path}:{scale:g}" if scale != 1 else str(adapter.path),
                kl_recovered=(own := recovered(base_kl, own_kl)),
                specificity=None if other is None else own.value - other,
                kl_base=float(base_kl.mean()),
                kl_adapter=float(own_kl.mean()),
                top1_base=float(rows["top1_0"][0].mean()),
                top1_adapter=float(rows["top1_S"][i].mean()),
                drift_adapter=drifts[i],
                drift_system=drift_system,
                kl_with_system=float(rows["kl_TS"][i].mean()),
                top1_with_system=float(rows["top1_TS"][i].mean()),
                prompts=len(messages),
                tokens=int(rows["tokens"][0].sum()),
                prompt_tokens_saved=saved,
                adapter_bytes=adapter.header.size,
                recovered_by_prompt=[float(x) for x in 1 - own_kl / np.maximum(base_kl, 1e-9)],
            )
        )
    return reports


def _one_hot(index: int, adapters: Sequence[tuple[Persona, float]]) -> list[float]:
    return [scale if i == index else 0.0 for i, (_, scale) in enumerate(adapters)]


def _compare(
    llm: Llama,
    teacher: Encoded,
    student: Encoded,
    adapters: Sequence[tuple[Persona, float]],
    n_own: int,
    max_tokens: int,
    widest: int,
    progress: Progress,
    trace: Trace,
) -> dict[str, list[np.ndarray]]:
    """Per-prompt means over reply tokens; each list has one array an adapter (or one).

    Only the first `n_own` adapters are also read behind the system message.
    """
    stop = stop_tokens(llm)
    n = len(teacher.rest)
    variants = [("0", -1), *(("S", i) for i in range(len(adapters)))]
    names = ("kl_0", "top1_0", "tokens", "kl_S", "top1_S", "kl_TS", "top1_TS")
    rows = {name: [np.zeros(n) for _ in range(max(1, len(adapters)))] for name in names}
    done, total = 0, n * (2 + len(adapters) + n_own)
    with ExitStack() as stack:
        contexts = {
            system: stack.enter_context(
                ParallelContext(llm, encoded.prefix, _GROUP, widest, _idle(adapters))
            )
            for system, encoded in (("T", teacher), ("", student))
        }
        for start in range(0, n, _GROUP):
            part = slice(start, start + _GROUP)
            contexts["T"].set_scales([0.0] * len(adapters))
            replies, logits = contexts["T"].greedy(teacher.rest[part], max_tokens, stop)
            target = [log_softmax(x) for x in logits]
            trace.replies += replies
            done += len(replies)
            progress(done, total)

            def score(
                context: ParallelContext,
                encoded: Encoded,
                index: int,
                suffix: str,
                start: int = start,
                part: slice = part,
                replies: list[list[int]] = replies,
                target: list[np.ndarray] = target,
            ) -> None:
                context.set_scales(_one_hot(index, adapters))
                prompts = encoded.rest[part]
                texts = [p + r[:-1] for p, r in zip(prompts, replies, strict=True)]
                read = context.read(texts, [len(p) - 1 for p in prompts])
                for i, (mine, want) in enumerate(zip(read, target, strict=True)):
                    slot = max(index, 0)
                    agree = mine.argmax(-1) == want.argmax(-1)
                    rows[f"top1_{suffix}"][slot][start + i] = agree.mean()
                    each = kl(want, log_softmax(mine))
                    trace.kl.setdefault((suffix, index), []).append(each)
                    rows[f"kl_{suffix}"][slot][start + i] = each.mean()
                    rows["tokens"][0][start + i] = len(want)

            for suffix, index in variants:
                score(contexts[""], student, index, suffix)
                done += len(replies)
                progress(done, total)
                if 0 <= index < n_own:
                    score(contexts["T"], teacher, index, "TS")
                    done += len(replies)
                    progress(done, total)
    return rows


def _idle(adapters: Sequence[tuple[Persona, float]]) -> list[tuple[Persona, float]]:
    """The same at scale 0: those compared are not mixed, and may not be such as can be."""
    return [(adapter, 0.0) for adapter, _ in adapters]


class Drift:
    """KL(0‖·) at the token after plain neutral text; open while a `with` block lasts.

    Without a chat around it: plain text behind a begin token, or a newline where the model has
    none, and for a system message behind that as it is rendered.
    """

    def __init__(
        self, llm: Llama, base: BaseModel, adapters: Sequence[tuple[Persona, float]]
    ) -> None:
        self._llm = llm
        self._texts = [tokenize(llm, text) for text in bundled("neutral")]
        self._widest = max(map(len, self._texts))
        bos = base.header.metadata.get("tokenizer.ggml.bos_token_id")
        wanted = base.header.metadata.get("tokenizer.ggml.add_bos_token")
        plain = [bos] if wanted and isinstance(bos, int) else tokenize(llm, "\n")
        self._context = ParallelContext(llm, plain, _GROUP, self._widest, _idle(adapters))
        self._bare = self._after(self._context)

    def _after(self, context: ParallelContext) -> np.ndarray:
        out = []
        for start in range(0, len(self._texts), _GROUP):
            part = self._texts[start : start + _GROUP]
            out += [log_softmax(x)[0] for x in context.read(part, [len(t) - 1 for t in part])]
        return np.stack(out)

    def of(self, scales: Sequence[float]) -> float:
        """That of the adapters at these scales."""
        self._context.set_scales(scales)
        return float(kl(self._bare, self._after(self._context)).mean())

    def of_system(self, teacher: Encoded) -> float:
        """That of a system message."""
        with ParallelContext(self._llm, teacher.prefix, _GROUP, self._widest) as context:
            return float(kl(self._bare, self._after(context)).mean())

    def __enter__(self) -> Drift:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()


@dataclass(frozen=True)
class Cost:
    """What one way costs at run time, medians over prompts."""

    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float


def run_cost(
    llm: Llama, template: ChatTemplate, system: str | None, messages: Sequence[str]
) -> Cost:
    """Time to first token from an empty cache, and decode speed, of a live model."""
    first, speed, length = [], [], []
    for message in messages:
        encoded = encode(llm, template, system, [message])
        tokens = encoded.prefix + encoded.rest[0]
        llm.reset()
        llm._ctx.kv_cache_clear()
        start = time.perf_counter()
        stream = llm.generate(tokens, temp=0.0)
        next(stream)
        first.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(16):
            next(stream)
        speed.append(16 / (time.perf_counter() - start))
        length.append(len(tokens))
    return Cost(int(np.median(length)), float(np.median(first)), float(np.median(speed)))

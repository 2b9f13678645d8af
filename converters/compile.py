"""Compile: a manifesto becomes a GGUF LoRA adapter, without training.

Knows the order of the steps and the settings of each effort. Paths and options in, a
path out; the command line wraps it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import superego
from superego.adapter import write_adapter
from superego.atomic import check_writable
from superego.base import BaseModel
from superego.converters.adapter_changes import pairs
from superego.converters.closed_form import REVISION, solve
from superego.converters.device import free_memory
from superego.converters.kept import Known, renew, stored
from superego.converters.memory import Plan, plan_memory
from superego.converters.metadata import Metadata, described
from superego.converters.products import probe_dtype
from superego.converters.references import (
    BLOCKS,
    REPLY,
    Prompts,
    prepare,
    seeds,
    write_replies,
)
from superego.converters.runtime_cells import correct_cells
from superego.converters.shape import Shape, read_shape
from superego.converters.slot import Slots
from superego.converters.slot_cache import KeptSlots
from superego.converters.transformer import Base
from superego.converters.unfinished import Unfinished
from superego.converters.walk import Aside
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.runtime import default_threads, load, peak_memory

if TYPE_CHECKING:
    from llama_cpp import Llama

METHOD = "closed-form"
_REACHED, _FIT_REACHED = 0.65, 0.9  # of the probe's rate, by products of few rows and of many
# GFLOP/s that all else than products would allow, on a processor and on a GPU
_WRITING_REST, _FIT_REST = (400.0, 1000.0), (550.0, 8000.0)
_BESIDE = 9  # seconds: imports, opening, the search for the slot
# GFLOP/s of matrix products from which on a machine has more of an effort's references, and all
_RATES = {"quick": (250.0, 1000.0), "standard": (250.0, 1000.0), "thorough": (350.0, 1000.0)}
SPEEDS = ("slow", "middle", "fast")


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the manifesto and the base."""

    effort: str
    blocks: int  # of reference conversations
    unseen: int  # conversations kept from the fit, to measure it
    rank: int
    ridge: float  # of attn_output
    ridge_ffn: float  # of ffn_down, whose inputs predict less and have more columns
    seed: int
    speed: str = "fast"  # has the references of such a machine: see `SPEEDS`
    most: int | None = None  # references; None: all of the blocks

    @property
    def messages(self) -> int:
        """How many reference messages are answered."""
        return sum(BLOCKS[: self.blocks]) if self.most is None else self.most

    @classmethod
    def for_references(cls, n: int) -> Settings:
        """The known settings that have most references, but no more than n (or the fewest)."""
        efforts = [cls.for_effort(e, speed=s) for e in _RATES for s in SPEEDS]
        fitting = [each for each in efforts if each.messages <= n]
        by_size = sorted(fitting or efforts, key=lambda each: (each.messages, each.rank))
        return by_size[-1 if fitting else 0]

    @classmethod
    def for_effort(
        cls, effort: str, rank: int | None = None, seed: int = 0, speed: str = "fast"
    ) -> Settings:
        """The settings of `quick`, `standard` or `thorough`, with a rank of one's own.

        An effort is a time: on a machine of less `speed` for it (see `speed_for`) it has fewer
        references.
        """
        known = {
            ("quick", "slow"): cls("quick", 1, 4, 96, 1.5, 6, seed),
            ("quick", "middle"): cls("quick", 2, 8, 96, 0.6, 2.4, seed),
            ("quick", "fast"): cls("quick", 3, 12, 96, 0.3, 1.2, seed),
            ("standard", "slow"): cls("standard", 3, 8, 160, 0.3, 1.2, seed),
            ("standard", "middle"): cls("standard", 4, 16, 160, 0.2, 1, seed),
            ("standard", "fast"): cls("standard", 5, 20, 160, 0.2, 1, seed),
            ("thorough", "slow"): cls("thorough", 7, 48, 256, 0.1, 0.5, seed),
            ("thorough", "middle"): cls("thorough", 9, 48, 256, 0.1, 0.5, seed),
            ("thorough", "fast"): cls("thorough", 12, 48, 256, 0.1, 0.5, seed),
        }
        if effort not in _RATES:
            raise SuperegoError(f"effort '{effort}': expected one of {', '.join(_RATES)}")
        found = replace(known[effort, speed], speed=speed)
        return found if rank is None else replace(found, rank=rank)


@dataclass(frozen=True)
class Opened:
    """A base opened for compiling: its tokenizer, its weights in memory, the matmul rate.

    The slots that its fits have found stay with it.
    """

    llm: Llama
    base: Base
    rate: float  # GFLOP/s
    sizes: Plan
    slots: Slots


def open_for_compile(
    model: BaseModel,
    llm: Llama,
    steps: Steps,
    prompts: Prompts | None = None,
    rank: int = 160,
    memory: float | None = None,
    use_cache: bool = True,
) -> Opened:
    """Open a base, with as many layers in memory as fit beside the work on these prompts.

    `memory` is the most that the process may have, in GB. Raises SuperegoError where the work
    does not fit. Without prompts room is left for those of `standard`. `use_cache` decides
    whether slots are read from the user's cache, and kept there.
    """
    dtype, rate = probe_dtype()
    rest = prompts.rest if prompts else [[0] * 40] * Settings.for_effort("standard").messages
    prefix = len(prompts.prefixes.teacher) if prompts else 400
    free = free_memory(torch.get_default_device())
    sizes = plan_memory(model, dtype, rest, prefix, rank, memory, free)
    steps.update("reading the base", 0, 1)
    base = Base(model.header, dtype, resident=False)
    base.keep(sizes.layers, sizes.tables)
    for index in range(sizes.layers):
        base.layer(index)
        steps.update("reading the base", index + 1, sizes.layers)
    slots = KeptSlots(model.fingerprint) if use_cache else Slots()
    return Opened(llm, base, rate, sizes, slots)


def speed_for(effort: str, threads: int | None = None) -> str:
    """Which of `SPEEDS` this machine's is: of how many references an effort has in its time.

    That is 25 s, 90 s and ten minutes for the 135M model.
    """
    torch.set_num_threads(threads or default_threads())
    return SPEEDS[sum(probe_dtype()[1] >= rate for rate in _RATES[effort])]


def compile_manifesto(
    manifesto: Manifesto,
    model: BaseModel,
    output: Path,
    settings: Settings,
    threads: int | None = None,
    use_cache: bool = True,
    steps: Steps | None = None,
    opened: Opened | None = None,
    known: Known | None = None,
    extra: Mapping[str, str | int | float] | None = None,
    memory: float | None = None,
) -> dict[str, Any]:
    """Write an adapter for `model` to `output`; returns what was done and what it cost.

    `opened` is the base where it is in memory already. `known` are replies to keep where
    this manifesto's teacher would say the same; the others are written, without the cache.
    `extra` is metadata to add. Torch computes on its default device. Raises SuperegoError for
    a base or manifesto that cannot be compiled, before any work.
    """
    steps = steps or Steps(quiet=True)
    started = time.perf_counter()
    check_writable(output, *model.files)
    read_shape(model.header)  # refuses what the walk cannot do, before any work
    torch.set_num_threads(threads or default_threads())
    torch.set_grad_enabled(False)
    llm = opened.llm if opened else load(model, threads=threads, vocab_only=True)
    prompts = prepare(llm, model, manifesto, seeds(settings.seed)[: settings.messages])
    rank = min(settings.rank, read_shape(model.header).d_model)
    opened = opened or open_for_compile(model, llm, steps, prompts, rank, memory, use_cache)
    base, rate = opened.base, opened.rate
    seconds = {"load": time.perf_counter() - started}

    mark = time.perf_counter()

    def told(done: int, total: int) -> None:
        steps.update("writing references", done, total)

    kept = cached = 0
    if known:
        conversations, kept = renew(llm, base, prompts, known, settings.blocks, told)
    else:
        conversations, cached = write_replies(
            llm,
            base,
            model.fingerprint,
            prompts,
            settings.blocks,
            use_cache,
            told,
            opened.sizes.room,
        )
    if not base.resident:
        base.keep(0, tables=False)  # a walk reads each layer once; its memory is for the rows
    seconds["references"] = time.perf_counter() - mark

    mark = time.perf_counter()
    unseen = Aside(conversations[-settings.unseen :])
    seen = conversations[: -settings.unseen]
    unfinished = Unfinished(
        [superego.__version__, REVISION, torch.__version__, model.fingerprint, str(base.dtype)],
        [base.device.type, torch.get_num_threads(), {**asdict(settings), "rank": rank}],
        [prompts.prefixes.teacher, prompts.prefixes.student],
        [[c.prompt, c.reply] for c in conversations],
    )
    if unfinished.layers:
        steps.note(f"going on behind layer {unfinished.layers} of {base.shape.n_layer}")
    changes = solve(
        base,
        seen,
        prompts.prefixes,
        rank,
        {"attn_output": settings.ridge, "ffn_down": settings.ridge_ffn},
        lambda done, total: steps.update("solving layers", done, total),
        opened.slots,
        unfinished,
        unseen,
    )
    seconds["fit"] = time.perf_counter() - mark

    mark = time.perf_counter()
    steps.update("measuring on unseen references", 0, 1)
    kl_base, kl_adapter = unseen.kl()
    steps.update("measuring on unseen references", 1, 1)
    seconds["measure"] = time.perf_counter() - mark

    mark = time.perf_counter()
    slot = opened.slots.of(base, [c.prompt for c in seen], prompts.prefixes)
    student, budget = prompts.prefixes.student, opened.sizes.budget
    corrected = correct_cells(base, model, changes, slot, student, threads, budget, steps.note)
    changes = corrected.changes if corrected else changes
    seconds["correct"] = time.perf_counter() - mark

    mark = time.perf_counter()
    tokens = sum(len(c.prompt) + len(c.reply) for c in conversations)
    recovered = 1 - kl_adapter / kl_base if kl_base > 0 else 0.0
    check_unchanged(model.header)
    write_adapter(
        output,
        model.architecture,
        pairs(changes),
        {
            **_metadata(manifesto, model, settings, rank, tokens, recovered, base.dtype),
            "superego.references": stored(model, conversations),
            "superego.references.unseen": len(unseen.conversations),  # the last ones
            **(extra or {}),
        },
    )
    unfinished.remove()
    seconds["write"] = time.perf_counter() - mark
    seconds["total"] = time.perf_counter() - started
    rows = sum(len(c.prompt) + len(c.reply) - 1 for c in seen)
    return {
        "adapter": str(output),
        "bytes": output.stat().st_size,
        "manifesto": manifesto.name,
        "effort": settings.effort,
        "rank": rank,
        "references": len(conversations),
        "references from cache": cached,
        "references kept": kept,
        "reference tokens": tokens,
        "kl recovered on unseen references": round(recovered, 4),
        "kl base": round(kl_base, 4),
        "kl adapter": round(kl_adapter, 4),
        **(corrected.report() if corrected else {}),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "compute type": str(base.dtype).removeprefix("torch."),
        "matmul peak GFLOP/s": round(rate),
        "fit GFLOP/s": round(fit_operations(base.shape, rows) / seconds["fit"] / 1e9),
        "layers kept in memory": f"{opened.sizes.layers} of {base.shape.n_layer}",
        "estimated memory MB": round(opened.sizes.peak / 2**20),
        "peak memory MB": peak_memory() // 2**20,
    }


def writing_seconds(shape: Shape, rows: int, rate: float) -> float:
    """About how long references of so many tokens take to write, at `rate` GFLOP/s of products.

    What is not products takes as long on every processor: measured with the 135M model at 106,
    430 and 2,800 GFLOP/s, and on one GPU.
    """
    return 2e-9 * shape.n_weights * rows * (1 / (_REACHED * rate) + 1 / _WRITING_REST[_on_gpu()])


def fit_seconds(shape: Shape, rows: int, rate: float) -> float:
    """About how long a fit of so many rows takes, as `writing_seconds`."""
    each = 1 / (_FIT_REACHED * rate) + 1 / _FIT_REST[_on_gpu()]
    return 1e-9 * fit_operations(shape, rows) * each


def _on_gpu() -> int:
    """Which of a constant's two numbers holds: 0 on a processor, 1 on a GPU."""
    return int(torch.get_default_device().type != "cpu")


def fit_operations(shape: Shape, rows: int) -> float:
    """Multiply-adds of a fit, times two: both forward walks and the Gram matrices."""
    heads = shape.n_head * shape.head_dim
    layer = shape.d_model * shape.head_dim * 2 * (shape.n_head + shape.n_head_kv)
    layer += 3 * shape.d_model * shape.d_ff * max(1, shape.n_expert_used)
    adapted = (heads,) if shape.n_expert else (heads, shape.d_ff)
    gram = sum(width * (width + shape.d_model) for width in adapted)
    return 2.0 * rows * shape.n_layer * (2 * layer + gram)


def plan(
    manifesto: Manifesto,
    model: BaseModel,
    settings: Settings,
    threads: int | None,
    memory: float | None = None,
) -> dict[str, Any]:
    """What a compile would do and cost, without doing it. Estimates, from a matmul probe."""
    torch.set_num_threads(threads or default_threads())
    shape = read_shape(model.header)
    llm = load(model, threads=threads, vocab_only=True)
    prompts = prepare(llm, model, manifesto, seeds(settings.seed)[: settings.messages])
    dtype, rate = probe_dtype()
    rest = prompts.rest
    rows = sum(len(r) + REPLY for r in rest)
    rank = min(settings.rank, shape.d_model)
    write, fit = writing_seconds(shape, rows, rate), fit_seconds(shape, rows, rate)
    sizes = plan_memory(model, dtype, rest, len(prompts.prefixes.teacher), rank, memory)
    per_pair = shape.n_head * shape.head_dim + shape.d_model
    per_pair += 0 if shape.n_expert else shape.d_ff + shape.d_model
    return {
        "manifesto": manifesto.name,
        "manifesto tokens": len(prompts.prefixes.teacher),
        "base": str(model.path),
        "architecture": shape.architecture,
        "effort": settings.effort,
        "rank": rank,
        "references": len(rest),
        "reference tokens, at most": rows,
        "compute type": str(dtype).removeprefix("torch."),
        "estimated seconds": round(_BESIDE + write + fit),
        "estimated memory MB": round(sizes.peak / 2**20),
        "layers kept in memory": f"{sizes.layers} of {shape.n_layer}",
        "batches of references": sizes.batches,
        "adapter bytes": 2 * rank * shape.n_layer * per_pair,
    }


def _metadata(
    manifesto: Manifesto,
    model: BaseModel,
    settings: Settings,
    rank: int,
    tokens: int,
    recovered: float,
    dtype: torch.dtype,
) -> Metadata:
    own: Metadata = {
        "adapter.lora.task_name": manifesto.name,
        "superego.settings": json.dumps(
            {
                **asdict(settings),
                "rank": rank,
                "reply_tokens": REPLY,
                "compute": str(dtype).removeprefix("torch."),
            },
            sort_keys=True,
        ),
        "superego.reference_tokens": tokens,
        "superego.kl_recovered": recovered,
    }
    return described(manifesto, model, METHOD, own)

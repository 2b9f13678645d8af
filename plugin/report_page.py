"""Turns what a report shows into one self-contained HTML page.

Knows scales, colours and words; report.html has the markup. Does not know how anything was
measured. Every text of a manifesto, a prompt or a reply is escaped by jinja2.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from superego.base import BaseModel
from superego.report import ADAPTER, BARE, SYSTEM, WAYS, PersonaReport, Token

HEAT = (0.05, 0.15, 0.4, 1.0)  # nats; where the shades of a token begin
_WIDTH, _HEIGHT = 360, 190  # of a plot, in its own units: about the pixels of a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 32


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """One place along x with both values; `label` is shown when it is pointed at."""

    x: float
    base: float  # y
    adapter: float  # y
    label: str


@dataclass(frozen=True)
class Plot:
    """A plot in its own units, y downwards."""

    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM

    @property
    def base_line(self) -> str:
        """The bare base's values as SVG points."""
        return " ".join(f"{mark.x:.1f},{mark.base:.1f}" for mark in self.marks)

    @property
    def adapter_line(self) -> str:
        """The adapter's values as SVG points."""
        return " ".join(f"{mark.x:.1f},{mark.adapter:.1f}" for mark in self.marks)


def render(reports: Sequence[PersonaReport], base: BaseModel, command: str, base_name: str) -> str:
    """The page. `command` is what made it, `base_name` what the user calls the base."""
    source = importlib.resources.files("superego").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        ways=WAYS,
        BARE=BARE,
        SYSTEM=SYSTEM,
        ADAPTER=ADAPTER,
        heat_steps=HEAT,
        shade=shade,
        by_prompt=by_prompt,
        by_position=by_position,
        summary=summary,
    )
    return environment.from_string(source).render(
        reports=reports, base=base, command=command, base_name=base_name
    )


def shade(token: Token) -> int:
    """0 (as the system message has it) to 4 (far from it)."""
    return sum(token.kl_adapter >= step for step in HEAT)


def summary(report: PersonaReport) -> dict[str, str]:
    """The figures that are compared, in the order in which they are shown."""
    m, costs = report.measures, report.costs
    recovered = m.kl_recovered
    return {
        "KL recovered": f"{recovered.value:.3f} ({recovered.low:.3f} to {recovered.high:.3f})",
        "KL to the system message": f"{m.kl_adapter:.4f}, bare base {m.kl_base:.4f}",
        "top-1 agreement": f"{m.top1_adapter:.3f}, bare base {m.top1_base:.3f}",
        "off-target drift": f"{m.drift_adapter:.3f}, system message {m.drift_system:.3f}",
        "KL with the system message too": f"{m.kl_with_system:.4f}",
        "prompt tokens saved": f"{m.prompt_tokens_saved:,}",
        "first token": f"{1000 * costs[ADAPTER].first_token_seconds:.0f} ms, system message "
        f"{1000 * costs[SYSTEM].first_token_seconds:.0f} ms",
        "decoding": f"{costs[ADAPTER].tokens_per_second:.0f} tokens/s, system message "
        f"{costs[SYSTEM].tokens_per_second:.0f}",
        "adapter on disk": f"{m.adapter_bytes / 1e6:.1f} MB",
    }


def by_prompt(report: PersonaReport) -> Plot:
    """KL of every prompt, the ones on which the manifesto changes most first."""
    order = sorted(range(len(report.prompts)), key=lambda i: -report.kl_base[i])
    labels = [
        f"{report.prompts[i]}: bare base {report.kl_base[i]:.3f}, "
        f"adapter {report.kl_adapter[i]:.3f}"
        for i in order
    ]
    return _plot(
        [report.kl_base[i] for i in order],
        [report.kl_adapter[i] for i in order],
        labels,
        [(0, "1"), (len(order) - 1, str(len(order)))],
    )


def by_position(report: PersonaReport) -> Plot:
    """KL at every position of a reply."""
    found = report.positions
    labels = [
        f"token {i}: bare base {base:.3f}, adapter {adapter:.3f} ({replies} replies)"
        for i, (base, adapter, replies) in enumerate(
            zip(found.base, found.adapter, found.replies, strict=True), 1
        )
    ]
    places = [0, *range(9, len(labels), 10)]
    return _plot(found.base, found.adapter, labels, [(i, str(i + 1)) for i in places])


def _plot(
    base: Sequence[float],
    adapter: Sequence[float],
    labels: Sequence[str],
    x_ticks: Sequence[tuple[int, str]],
) -> Plot:
    steps = _steps(max(*base, *adapter, 1e-6))
    top = steps[-1]

    def x(i: int) -> float:
        return _LEFT + 5 + (_WIDTH - _LEFT - _RIGHT - 10) * i / max(1, len(labels) - 1)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    return Plot(
        marks=[Mark(x(i), y(base[i]), y(adapter[i]), label) for i, label in enumerate(labels)],
        x_ticks=[Tick(x(i), label) for i, label in dict(x_ticks).items()],
        y_ticks=[Tick(y(value), f"{value:g}") for value in steps],
    )


def _steps(highest: float) -> list[float]:
    """Round numbers from 0 to one that is not below `highest`, three to six of them."""
    unit = 10.0 ** math.floor(math.log10(highest))
    step = next(unit * k for k in (0.2, 0.5, 1, 2, 5) if highest / (unit * k) <= 5)
    return [round(step * i, 10) for i in range(math.ceil(highest / step - 1e-9) + 1)]

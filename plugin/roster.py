"""Who is served: the personas' names, and what a request for one of them becomes.

Knows personas, scales and llama-server's `lora` field. Does not know HTTP or processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from superego.adapter import Adapter, check_fit, read_adapter, split_scale
from superego.base import BaseModel
from superego.bundled import find_manifesto
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.pairs import slot_scales, write_slot
from superego.template import ChatTemplate

ALORA_KEY = "adapter.alora.invocation_tokens"
_NAME = re.compile(r"[\w.:+-]{1,64}")
# What decides whose reply comes out, or which slot's state is used: ours to set.
_OURS = ("lora", "id_slot", "cache_prompt", "n_cache_reuse")


class Refused(Exception):
    """A request that cannot be served: status, message, and OpenAI's `code` and `param`."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass(frozen=True)
class Persona:
    """One name of the roster: an adapter at a scale, a manifesto, or (neither) the bare base."""

    name: str
    adapter: Adapter | None = None
    scale: float = 0.0
    manifesto: Manifesto | None = None

    @property
    def kind(self) -> str:
        """adapter, system message or base."""
        if self.adapter is not None:
            return "adapter"
        return "system message" if self.manifesto is not None else "base"

    @property
    def activated(self) -> bool:
        """Whether it is an activated LoRA, which acts from the reply's header on."""
        return self.adapter is not None and ALORA_KEY in self.adapter.header.metadata


@dataclass(frozen=True)
class Roster:
    """The personas of one base, and the adapter files behind them in llama-server's order."""

    personas: dict[str, Persona]
    adapters: list[Path]  # a file's place is its id in llama-server
    has_system_role: bool
    slots: dict[int, int]  # an adapter's place -> that of its slot alone, where it has one

    def choose(self, model: object) -> tuple[Persona, float]:
        """The persona and scale that a request's `model` names; raises Refused."""
        if not isinstance(model, str) or not model:
            raise Refused(400, f"'model' is missing; {self._listing()}", None, "model")
        persona = self.personas.get(model)
        if persona is not None:
            return persona, persona.scale
        name, at, text = model.rpartition("@")
        persona = self.personas.get(name)
        if not at or persona is None:
            raise Refused(
                404, f"no persona '{model}'; {self._listing()}", "model_not_found", "model"
            )
        if persona.adapter is None:
            raise Refused(
                400, f"'{name}' is a {persona.kind}: only adapters have a scale", None, "model"
            )
        try:
            scale = float(text)
        except ValueError:
            scale = float("nan")
        if not -100 <= scale <= 100:
            raise Refused(
                400, f"'{model}': '{text}' is not a scale between -100 and 100", None, "model"
            )
        return persona, scale

    def rewrite(self, body: dict[str, Any], chat: bool) -> Persona:
        """Turn a client's request, in place, into llama-server's; raises Refused.

        Every adapter is named with its scale, the idle ones with 0: without that llama-server
        keeps what the slot's last request had, and with it another persona's cached state.
        """
        for key in _OURS:
            if key in body:
                raise Refused(
                    400,
                    f"'{key}' is set by the server; the persona is 'model', NAME@SCALE",
                    None,
                    key,
                )
        persona, scale = self.choose(body.get("model"))
        if self.adapters:
            scales = dict.fromkeys(range(len(self.adapters)), 0.0)
            if persona.adapter is not None:
                place = self.adapters.index(persona.adapter.path)
                scales[place] = scale
                if place in self.slots:
                    (scales[self.slots[place]],) = slot_scales([scale], [True])
            body["lora"] = [{"id": i, "scale": value} for i, value in scales.items()]
        # An activated LoRA's turns stay in the slot as it coloured them, even for another one.
        body["cache_prompt"] = not persona.activated
        if persona.manifesto is not None:
            if not chat:
                raise Refused(
                    400,
                    f"'{persona.name}' is a system message, which plain completions do not have; "
                    "use /v1/chat/completions",
                    None,
                    "model",
                )
            body["messages"] = self._with_system(persona.manifesto.body, body.get("messages"))
        return persona

    def _with_system(self, system: str, messages: object) -> list[Any]:
        """The manifesto in front; a system message of the request's own follows it in one."""
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "'messages' must be a list of messages", None, "messages")
        rest = list(messages)
        first = rest[0]
        if isinstance(first, dict) and first.get("role") in ("system", "developer"):
            own = _text(first.get("content"))
            system, rest = f"{system}\n\n{own}", rest[1:]
        if self.has_system_role:
            return [{"role": "system", "content": system}, *rest]
        if rest and isinstance(rest[0], dict) and rest[0].get("role") == "user":
            folded = f"{system}\n\n{_text(rest[0].get('content'))}"
            return [{**rest[0], "content": folded}, *rest[1:]]
        return [{"role": "user", "content": system}, *rest]

    def _listing(self) -> str:
        return "there are " + ", ".join(self.personas)


def _text(content: object) -> str:
    """A message's text, also where it comes in parts; raises Refused for other parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise Refused(400, "a message's 'content' must be text here", None, "messages")


def read_roster(base: BaseModel, base_name: str, texts: Sequence[str]) -> Roster:
    """The roster of `[NAME=]FILE[:SCALE]` and manifestos; raises SuperegoError."""
    has_system_role = ChatTemplate(base.header).has_system_role
    personas = {base_name: Persona(base_name)}
    adapters: list[Path] = []
    for text in texts:
        persona = _read_persona(text)
        if persona.name in personas:
            other = "the base" if persona.name == base_name else "another persona"
            raise SuperegoError(
                f"{text}: the name '{persona.name}' is taken by {other}; name it: NAME={text}"
            )
        if persona.adapter is not None:
            check_fit(persona.adapter, base.header)
            if "," in str(persona.adapter.path):
                raise SuperegoError(
                    f"{persona.adapter.path}: llama-server takes the comma in the path for the "
                    "start of another file; rename it"
                )
            if persona.adapter.path not in adapters:
                adapters.append(persona.adapter.path)
        personas[persona.name] = persona
    return Roster(personas, adapters, has_system_role, {})


def with_slots(roster: Roster, folder: Path) -> Roster:
    """The roster with the slots of its adapters as files of their own, written to `folder`.

    A request at another scale than 1 needs them: a slot acts as a whole (pairs.py).
    """
    adapters, slots = list(roster.adapters), {}
    read = {p.adapter.path: p.adapter for p in roster.personas.values() if p.adapter is not None}
    for place, path in enumerate(roster.adapters):
        alone = folder / f"slot-{place}.gguf"
        if write_slot(read[path], alone):
            slots[place] = len(adapters)
            adapters.append(alone)
    return replace(roster, adapters=adapters, slots=slots)


def base_name(base: str, model: BaseModel) -> str:
    """The bare base's id: what was typed, without the folder and ending of a file."""
    if base.startswith("ollama:"):
        return base.removeprefix("ollama:").replace("/", "-")
    if base == "smollm2" and not Path(base).exists():
        return base
    return re.sub(r"[^\w.:+-]", "-", model.path.stem)[:64]


def _read_persona(text: str) -> Persona:
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = "", text
    path, scale = split_scale(rest)
    if path.suffix == ".gguf" or _is_gguf(path):
        adapter = read_adapter(path.absolute())
        return Persona(_checked(name or path.stem, text), adapter, 1.0 if scale is None else scale)
    if scale is not None:
        raise SuperegoError(f"{text}: a manifesto has no scale; only adapters (.gguf) have")
    manifesto = find_manifesto(rest)
    return Persona(_checked(name or manifesto.name, text), manifesto=manifesto)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _checked(name: str, text: str) -> str:
    if not _NAME.fullmatch(name):
        raise SuperegoError(
            f"{text}: '{name}' cannot be a model id (1 to 64 of letters, digits and . : + - _); "
            "give one: NAME=FILE"
        )
    return name

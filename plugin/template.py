"""Chat templates: the GGUF's own Jinja template, rendered in jinja2's sandbox.

Knows messages and text. Does not know tokens. A manifesto is only ever a value here,
never a template.
"""

from __future__ import annotations

import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from superego.errors import SuperegoError
from superego.gguf_file import Header

Message = dict[str, str]
_MARK = "superego-probe-7d1f"


class _Refused(Exception):
    """The template called raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


class ChatTemplate:
    """A base model's chat template and how it takes a system message."""

    def __init__(self, header: Header) -> None:
        self.source = header.text("tokenizer.chat_template")
        self._path = header.path
        if not self.source:
            raise SuperegoError(
                f"{header.path}: has no chat template (tokenizer.chat_template); "
                "Superego needs an instruction-tuned model, not a bare pretrained one"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # A fixed day: a template that prints today's date must not change a compile.
        day = datetime.datetime(2026, 1, 1)
        environment.globals.update(raise_exception=_raise_exception, strftime_now=day.strftime)
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise SuperegoError(f"{header.path}: chat template is broken: {error}") from None
        tokens = header.metadata.get("tokenizer.ggml.tokens", [])
        self._special = {
            f"{name}_token": _token(tokens, header.metadata.get(f"tokenizer.ggml.{name}_token_id"))
            for name in ("bos", "eos")
        }
        self.has_system_role = self._probe_system_role()

    def render(self, messages: list[Message], reply: bool = True) -> str:
        """The text that the model reads; with `reply` it ends where the reply begins.

        A system message in front is folded into the first user turn where the template
        has no system role, as users of such models do by hand.
        """
        if messages and messages[0]["role"] == "system" and not self.has_system_role:
            messages = _fold(messages)
        try:
            return self._render(messages, reply)
        except _Refused as error:
            raise SuperegoError(f"{self._path}: chat template refuses: {error}") from None

    def _render(self, messages: list[Message], reply: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=reply, **self._special
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise SuperegoError(f"{self._path}: chat template fails: {error}") from None

    def _probe_system_role(self) -> bool:
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "hi"}]
        try:
            return _MARK in self._render(messages, True)
        except (_Refused, SuperegoError):
            return False


def _fold(messages: list[Message]) -> list[Message]:
    system, rest = messages[0]["content"], list(messages[1:])
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def _token(tokens: Any, index: Any) -> str:
    if isinstance(tokens, list) and isinstance(index, int) and 0 <= index < len(tokens):
        return str(tokens[index])
    return ""


def _tojson(value: object, indent: int | None = None) -> str:
    import json  # jinja2's own filter escapes HTML, which prompts must not have

    return json.dumps(value, ensure_ascii=False, indent=indent)


def conversation(system: str | None, user: str) -> list[Message]:
    """One user message, behind a system message if there is one."""
    front = [{"role": "system", "content": system}] if system is not None else []
    return [*front, {"role": "user", "content": user}]

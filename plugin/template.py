"""Chat templates: the GGUF's own Jinja template, rendered in a sandbox in another process.

Knows messages and text. Does not know tokens. A manifesto is only ever a value here,
never a template.
"""

from __future__ import annotations

from typing import Any

from superego.errors import SuperegoError
from superego.gguf_file import Header
from superego.template_process import Failed, Limit, Refused, check, render

Message = dict[str, str]
_MARK = "superego-probe-7d1f"
_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A base model's chat template and how it takes a system message."""

    def __init__(self, header: Header) -> None:
        self.source = header.text(_KEY)
        self._path = header.path
        if not self.source:
            raise SuperegoError(
                f"{header.path}: has no chat template (tokenizer.chat_template); "
                "Superego needs an instruction-tuned model, not a bare pretrained one"
            )
        check_templates(header)
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
        except Refused as error:
            raise SuperegoError(f"{self._path}: chat template refuses: {error}") from None
        except Limit as error:
            raise SuperegoError(_too_much(self._path, error)) from None
        except Failed as error:
            raise SuperegoError(f"{self._path}: chat template fails: {error}") from None

    def _render(self, messages: list[Message], reply: bool) -> str:
        values = {"messages": messages, "add_generation_prompt": reply, **self._special}
        return render(self.source, values)

    def _probe_system_role(self) -> bool:
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "hi"}]
        try:
            return _MARK in self._render(messages, True)
        except Limit as error:
            raise SuperegoError(_too_much(self._path, error)) from None
        except Failed:
            return False


def check_templates(header: Header) -> None:
    """Compile every template of a file; raises SuperegoError for a broken or boundless one.

    llama-cpp-python compiles all of them when it opens the file, in this process, and constant
    expressions such as 9 ** 9 ** 9 are computed then.
    """
    for key, source in header.metadata.items():
        if isinstance(source, str) and (key == _KEY or key.startswith(f"{_KEY}.")):
            try:
                check(source)
            except Limit as error:
                raise SuperegoError(_too_much(header.path, error)) from None
            except Failed as error:
                raise SuperegoError(f"{header.path}: chat template is broken: {error}") from None


def _too_much(path: object, error: Limit) -> str:
    return f"{path}: chat template {error}; no model's does: do not use this file"


def _fold(messages: list[Message]) -> list[Message]:
    system, rest = messages[0]["content"], list(messages[1:])
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def _token(tokens: Any, index: Any) -> str:
    if isinstance(tokens, list) and isinstance(index, int) and 0 <= index < len(tokens):
        return str(tokens[index])
    return ""


def conversation(system: str | None, user: str) -> list[Message]:
    """One user message, behind a system message if there is one."""
    front = [{"role": "system", "content": system}] if system is not None else []
    return [*front, {"role": "user", "content": user}]

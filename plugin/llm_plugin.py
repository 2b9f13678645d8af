"""The plugin for Simon Willison's llm: persona/NAME models, templates, `llm superego`.

Knows llm's hooks. Imports neither torch nor llama.cpp: llm loads its plugins at every start.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import llm
from pydantic import Field

from superego import library
from superego.errors import SuperegoError

if TYPE_CHECKING:
    from llama_cpp import Llama

_loaded: dict[str, tuple[Llama, tuple[str, float]]] = {}  # base -> model, adapter that is on


@atexit.register
def _close() -> None:
    """Free the models while Python still stands: later, llama-cpp-python's own end fails."""
    while _loaded:
        _loaded.popitem()[1][0].close()


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """One model for each persona that `superego add` has kept."""
    found, wrong = library.entries()
    for line in wrong:
        click.echo(f"superego: {line}", err=True)
    for entry in found:
        register(Persona(entry))


@llm.hookimpl
def register_template_loaders(register: Callable[..., None]) -> None:
    """-t persona:NAME: a bundled manifesto, or that of a kept persona, as system prompt."""
    register("persona", load_template)


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """`llm superego …`: the whole command line."""

    @cli.command(
        name="superego",
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
        short_help="Superego's command line: compile, add, merge, …",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def superego(arguments: tuple[str, ...]) -> None:
        from superego.cli import main

        main.main(args=list(arguments), prog_name="llm superego")


def load_template(name: str) -> llm.Template:
    """The manifesto as a template's system prompt; raises SuperegoError for unknown names."""
    from superego.adapter import read_adapter
    from superego.bundled import bundled

    known = bundled()
    if name in known:
        text = known[name].body
    else:
        try:
            found = read_adapter(library.find(name).adapter).own.get("manifesto")
        except SuperegoError as error:
            raise SuperegoError(f"{error}; bundled ones: {', '.join(known)}") from None
        if not isinstance(found, str):
            raise SuperegoError(f"{name}: its adapter holds no manifesto")
        text = found
    # llm fills in $names: a manifesto's own dollar signs are to stay
    return llm.Template(name=f"persona:{name}", system=text.replace("$", "$$"))


class Persona(llm.Model):
    """A base with an adapter on, in llama.cpp. A system prompt still works on top."""

    can_stream = True

    class Options(llm.Options):
        """What -o takes."""

        temperature: float = Field(0.0, ge=0, le=5, description="0: always the likeliest token")
        max_tokens: int = Field(512, ge=1, description="Tokens of a reply at most")
        n_ctx: int = Field(4096, ge=64, description="Tokens of the context")
        scale: float | None = Field(
            None, ge=-100, le=100, description="The adapter's strength, else the one it has"
        )

    def __init__(self, entry: library.Entry) -> None:
        self.model_id = f"persona/{entry.name}"
        self._entry = entry

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Yield the reply's pieces; the conversation is what `prompt.messages` holds."""
        try:
            yield from self._reply(prompt)
        except SuperegoError as error:
            raise llm.ModelError(str(error)) from None

    def _reply(self, prompt: llm.Prompt) -> Iterator[str]:
        from superego.chat import Chat
        from superego.gguf_file import read_header
        from superego.template import ChatTemplate

        options: Any = prompt.options
        live = self._model(options)
        system: list[str] = []
        turns: list[dict[str, str]] = []
        for message in prompt.messages:
            text = "".join(getattr(part, "text", "") for part in message.parts)
            if message.role == "system":
                system.append(text)
            elif message.role in ("user", "assistant"):
                turns.append({"role": message.role, "content": text})
        if not turns or turns[-1]["role"] != "user":
            raise SuperegoError("there is no message to answer")
        template = ChatTemplate(read_header(self._base().path))
        chat = Chat(live, template, "\n\n".join(system) or None)
        chat.messages = turns[:-1]
        if not chat.messages:
            live.reset()  # as in a fresh process: rounding depends on what is read together
        yield from chat.reply(turns[-1]["content"], options.max_tokens, options.temperature)

    def _base(self) -> Any:
        from superego.base import open_base

        return open_base(self._entry.base)

    def _model(self, options: Any) -> Llama:
        """The live base with this persona on, shared with the other personas of the base."""
        import superego
        from superego.runtime import load

        key = f"{self._entry.base}:{options.n_ctx}"
        scale = self._entry.scale if options.scale is None else options.scale
        wanted = (str(self._entry.adapter), scale)
        if key not in _loaded:
            _loaded[key] = (load(self._base(), options.n_ctx), ("", 0.0))
        live, on = _loaded[key]
        if on != wanted:
            superego.swap(live, self._entry.adapter, scale)
            _loaded[key] = (live, wanted)
        return live

"""A user's own conversations, to be learnt beside the teacher's: OpenAI's message format.

Knows the file's form and how its turns become prompts and replies. Does not know training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.base import BaseModel
from superego.converters.streams import Conversation
from superego.errors import SuperegoError
from superego.prompt import encode_messages
from superego.runtime import stop_tokens
from superego.template import ChatTemplate, Message

if TYPE_CHECKING:
    from llama_cpp import Llama

_MOST_BYTES = 64 * 2**20
_EXPECTED = 'expected {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}'


@dataclass(frozen=True)
class Example:
    """One line: turns of user and assistant in alternation, and where it stands."""

    line: int
    messages: list[Message]


def read_examples(path: Path) -> list[Example]:
    """The conversations of a JSONL file; raises SuperegoError naming the line.

    A system message at the front is left out: the manifesto stands in its place.
    """
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise SuperegoError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise SuperegoError(f"{path}: cannot be read as text: {error}") from None
    if len(raw) > _MOST_BYTES:
        raise SuperegoError(f"{path}: larger than {_MOST_BYTES >> 20} MB; give a part of it")
    found = [
        Example(number, _messages(f"{path}, line {number}", line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise SuperegoError(f"{path}: holds no conversations ({_EXPECTED}, one a line)")
    return found


def _messages(where: str, line: str) -> list[Message]:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise SuperegoError(f"{where}: is not JSON; {_EXPECTED}") from None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SuperegoError(f"{where}: has no list 'messages'; {_EXPECTED}")
    turns: list[Message] = []
    for i, message in enumerate(messages):
        place = f"{where}, message {i + 1}"
        if not isinstance(message, dict):
            raise SuperegoError(f"{place}: is not an object; {_EXPECTED}")
        role, content = message.get("role"), message.get("content")
        if i == 0 and role == "system":
            continue
        wanted = "assistant" if len(turns) % 2 else "user"
        if role != wanted:
            raise SuperegoError(f"{place}: role is {role!r}, expected '{wanted}'")
        if not isinstance(content, str) or not content.strip():
            raise SuperegoError(f"{place}: content is {_kind(content)}, expected a text")
        turns.append({"role": wanted, "content": content})
    if len(turns) < 2 or len(turns) % 2:
        raise SuperegoError(f"{where}: must end with an assistant's message that is to be learnt")
    return turns


def _kind(content: object) -> str:
    return "empty" if isinstance(content, str) else f"of type {type(content).__name__}"


def as_conversations(
    llm: Llama, base: BaseModel, path: Path, examples: list[Example], prefix: list[int]
) -> list[Conversation]:
    """Every assistant's turn as a reply to all before it, behind the student's `prefix`.

    Raises SuperegoError where one does not fit the model's context, with both lengths.
    """
    template = ChatTemplate(base.header)
    end = base.header.metadata.get("tokenizer.ggml.eot_token_id")
    if not isinstance(end, int):
        end = base.header.metadata.get("tokenizer.ggml.eos_token_id")
    ends = [end] if isinstance(end, int) else sorted(stop_tokens(llm))[:1]
    found = []
    for example in examples:
        for i in range(1, len(example.messages), 2):
            said = str(example.messages[i]["content"])
            tokens = encode_messages(llm, template, example.messages[:i])
            reply = llm.tokenize(said.encode(), add_bos=False, special=False) + ends
            if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
                raise SuperegoError(
                    f"{path}, line {example.line}: this model's chat template renders it with "
                    "another beginning than a single message; it cannot be learnt from"
                )
            length = len(tokens) + len(reply)
            if base.context_length and length > base.context_length:
                raise SuperegoError(
                    f"{path}, line {example.line}: message {i + 1} ends after {length:,} tokens, "
                    f"the model's context has {base.context_length:,}; shorten the conversation"
                )
            found.append(Conversation(tokens[len(prefix) :], reply))
    return found

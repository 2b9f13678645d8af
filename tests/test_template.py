"""Chat templates: rendered as the model's file says, in a sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CHATML, tiny_model

from superego.base import BaseModel
from superego.errors import SuperegoError
from superego.gguf_file import read_header
from superego.template import ChatTemplate, conversation

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)


def template(tmp_path: Path, source: str | None) -> ChatTemplate:
    return ChatTemplate(read_header(tiny_model(tmp_path / "t.gguf", template=source)))


def test_smollm2_puts_its_default_in_front_only_without_a_system_message(
    smollm2: BaseModel,
) -> None:
    chat = ChatTemplate(smollm2.header)
    bare = chat.render(conversation(None, "Hi"))
    ours = chat.render(conversation("Be kind.", "Hi"))
    tail = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert bare == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face" + tail
    )
    assert ours == "<|im_start|>system\nBe kind." + tail


def test_without_a_system_role_the_manifesto_joins_the_first_user_turn(tmp_path: Path) -> None:
    chat = template(tmp_path, NO_SYSTEM)
    assert not chat.has_system_role
    assert "user\nBe kind.\n\nHi<|im_end|>" in chat.render(conversation("Be kind.", "Hi"))


def test_a_manifesto_is_never_a_template(tmp_path: Path) -> None:
    chat = template(tmp_path, CHATML)
    assert "{{ 1 + 1 }}" in chat.render(conversation("{{ 1 + 1 }}", "Hi"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "no chat template"),
        ("{% for %}", "chat template is broken"),
        ("{{ raise_exception('only assistants') }}", "refuses: only assistants"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template fails"),
        ("{{ 1 / 0 }}", "chat template fails"),
    ],
)
def test_what_a_template_cannot_do_is_said(tmp_path: Path, source: str | None, said: str) -> None:
    with pytest.raises(SuperegoError, match=said):
        template(tmp_path, source).render(conversation(None, "Hi"))

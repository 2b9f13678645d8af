"""Numbers and token lists that end llama.cpp's process, refused before it reads the file.

Knows what llama.cpp 0.5.0-dev asserts of a model's metadata; what it refuses with an error of its
own is not repeated here. Does not know what the numbers mean.
"""

from __future__ import annotations

import math
from typing import Any

from superego.errors import SuperegoError
from superego.gguf_file import Header

_MOST_LAYERS = _MOST_EXPERTS = 512
_LONGEST_CONTEXT = 1 << 28  # llama-cpp-python makes room for as many tokens at every call
# Of an architecture's own keys: the least and the most, and whether it must be there.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "context_length": (1, _LONGEST_CONTEXT, True),
    "block_count": (1, _MOST_LAYERS, True),
    "embedding_length": (1, 1 << 24, True),
    "attention.head_count": (1, 1 << 16, False),
    "attention.head_count_kv": (0, 1 << 16, False),  # 0 in layers without attention
    "attention.key_length": (1, 1 << 16, False),
    "attention.value_length": (1, 1 << 16, False),
    "attention.layer_norm_rms_epsilon": (0, 1, False),
    "attention.layer_norm_epsilon": (0, 1, False),
    "rope.dimension_count": (0, 1 << 16, False),
    "rope.freq_base": (1e-6, 1e30, False),
    "expert_count": (0, _MOST_EXPERTS, False),
    "expert_used_count": (0, _MOST_EXPERTS, False),
}
_SCALINGS = ("none", "linear", "yarn", "longrope")
_LISTS: dict[str, Any] = {"tokens": str, "merges": str, "scores": (int, float), "token_type": int}


def check_loadable(header: Header) -> None:
    """Raise SuperegoError for a model whose metadata would end llama.cpp's process."""
    architecture = header.text("general.architecture")

    def refuse(key: str, value: object, expected: str) -> SuperegoError:
        return SuperegoError(
            f"{header.path}: GGUF is damaged: {key} is {str(value)[:60]}, expected {expected}"
        )

    numbers: dict[str, list[float]] = {}
    for key, (least, most, needed) in _RANGES.items():
        name = f"{architecture}.{key}"
        value = header.metadata.get(name)
        if value is None and not needed:
            continue
        found: list[Any] = value if isinstance(value, list) else [value]  # a list: one a layer
        whole = isinstance(least, int) and isinstance(most, int) and most > 1
        kinds: Any = int if whole else (int, float)
        if not found or not all(
            isinstance(n, kinds) and math.isfinite(n) and least <= n <= most for n in found
        ):
            raise refuse(name, value, f"{'numbers' if whole else 'a number'} {least} to {most}")
        numbers[key] = found
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in _SCALINGS:
        raise refuse(f"{architecture}.rope.scaling.type", scaling, f"one of {', '.join(_SCALINGS)}")
    most = max(numbers.get("expert_count", [0]))
    if (used := max(numbers.get("expert_used_count", [0]))) > most or (most and not used):
        raise refuse(f"{architecture}.expert_used_count", used, f"1 to {most:g} of the experts")
    if (
        len(lengths := numbers.get("attention.head_count", [])) == 1
        and lengths[0]
        and ("attention.key_length" not in numbers)
    ):
        width, heads = numbers["embedding_length"][0], lengths[0]
        if width % heads or heads > width:
            raise refuse(
                f"{architecture}.attention.head_count", f"{heads:g}", f"a part of {width:g}"
            )
    _check_tokens(header, refuse)


def _check_tokens(header: Header, refuse: Any) -> None:
    for key, kind in _LISTS.items():
        name = f"tokenizer.ggml.{key}"
        value = header.metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise refuse(name, value, "a list of " + ("texts" if kind is str else "numbers"))
    tokens = [t for t in header.metadata.get("tokenizer.ggml.tokens", []) if t]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        if "\N{REPLACEMENT CHARACTER}" not in twice:  # bytes that are no text differ unseen
            raise refuse("tokenizer.ggml.tokens", f"twice {twice!r}", "each token once")

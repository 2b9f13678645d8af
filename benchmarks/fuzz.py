"""Damaged inputs, seeded: each must end in success or one clear line, soon, in little memory.

Bases, adapters, manifestos, front matter, chat templates and sessions are damaged and then read
by everything that reads them, llama.cpp included, in a child process with limits: a crash, a
hang or a balloon there is a finding with its case number. Prints Markdown. `--case KIND:NUMBER`
runs one case in this process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 5.0  # the most that a case may take
BALLOON = 400  # MB that a case may hold beside what the process has
ADDRESSES = 12 << 30  # bytes of address space: torch and llama.cpp map several GB of nothing
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 33, 63, 64, 65, 127, 255, 256, 257, 4095, 65535, 65536, 2**24, 2**31 - 1,
    2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    b"", b"\0", b"a\0b", b"\xff\xfe\x80", b"\xed\xa0\x80", b"{{ 7 * 7 }}", b"x" * 5000, b"llama",
    b"qwen3", b"adapter", b"lora", b"gpt2", b"\x1b[31m", b"a\nb", b"[]", b"{}", b"[" * 5000,
    b"nan", b"-1", "\u202e\u00e9".encode(),
)  # fmt: skip


# GGUF files, taken apart and damaged


@dataclass
class Parts:
    """A GGUF as its writer saw it: entries (key, type, payload) and tensors, each as bytes."""

    entries: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]  # name, dims as in the file, type, offset
    data: bytes
    numbers: list[tuple[int, int]] = field(default_factory=list)  # offset, width of each length

    def bytes(self, alignment: int = 32) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        for key, kind, payload in self.entries:
            out += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload
        for name, dims, kind, offset in self.tensors:
            out += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
            out += b"".join(struct.pack("<Q", d % 2**64) for d in dims)
            out += struct.pack("<IQ", kind % 2**32, offset % 2**64)
        return out + bytes(-len(out) % alignment) + self.data


def take_apart(raw: bytes) -> Parts:
    """The parts of a whole GGUF, with the place of every count, length, type and offset."""
    at = 8
    found = Parts([], [], b"", [(4, 4), (8, 8), (16, 8)])

    def number(width: int) -> int:
        nonlocal at
        found.numbers.append((at, width))
        at += width
        return int.from_bytes(raw[at - width : at], "little")

    def text() -> bytes:
        nonlocal at
        n = number(8)
        at += n
        return raw[at - n : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            item, count = number(4), number(8)
            if item in SCALARS:
                at += struct.calcsize(SCALARS[item]) * count
            else:
                for _ in range(count):
                    skip(item)
        else:
            at += struct.calcsize(SCALARS[kind])

    n_tensors, n_keys = struct.unpack_from("<QQ", raw, at)
    at += 16
    for _ in range(n_keys):
        key, kind = text(), number(4)
        start = at
        skip(kind)
        found.entries.append((key, kind, raw[start:at]))
    for _ in range(n_tensors):
        name = text()
        dims = [number(8) for _ in range(number(4))]
        found.tensors.append((name, dims, number(4), number(8)))
    found.data = raw[at + -at % 32 :]
    # the tokens' own lengths are thousands and all alike: keep some of them
    if len(found.numbers) > 600:
        found.numbers = found.numbers[:300] + found.numbers[-300:]
    return found


def payload(rng: random.Random, kind: int, depth: int = 0) -> bytes:
    """A random value of a GGUF type, often an extreme one."""
    if kind in (6, 12):
        return struct.pack(
            "<" + SCALARS[kind],
            rng.choice(FLOATS)
            if kind == 12
            else min(max(rng.choice(FLOATS), -3e38), 3e38)
            if rng.random() < 0.7
            else float("nan"),
        )
    if kind in SCALARS:
        width = struct.calcsize(SCALARS[kind])
        return (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    if kind == 8:
        found = rng.choice(TEXTS)
        length = len(found) if rng.random() < 0.8 else rng.choice(NUMBERS)
        return struct.pack("<Q", length) + found
    if kind == 9:
        item = rng.choice([0, 4, 5, 6, 7, 8, 9, 10, 13, 2**31])
        n = rng.choice([0, 1, 2, 5])
        body = b"".join(payload(rng, item, depth + 1) for _ in range(n)) if depth < 40 else b""
        count = n if rng.random() < 0.7 else rng.choice(NUMBERS)
        return struct.pack("<IQ", item, count) + body
    return b""


def damage_gguf(rng: random.Random, raw: bytes, parts: Parts, keys: list[bytes]) -> bytes:
    """One damaged copy; `keys` are those that are read, damaged more often than others."""
    way = rng.random()
    header = len(raw) - len(parts.data)
    if way < 0.12:  # single bytes
        out = bytearray(raw)
        for _ in range(rng.choice([1, 2, 8])):
            out[rng.randrange(header if rng.random() < 0.9 else len(raw))] = rng.randrange(256)
        return bytes(out)
    if way < 0.2:  # cut short, or cut out
        at = rng.randrange(header if rng.random() < 0.7 else len(raw))
        return raw[:at] if rng.random() < 0.7 else raw[:at] + raw[at + rng.randrange(1, 64) :]
    if way < 0.45:  # a length, count, type, dimension or offset
        out = bytearray(raw)
        at, width = rng.choice(parts.numbers)
        old = int.from_bytes(raw[at : at + width], "little")
        new = rng.choice([*NUMBERS, old + 1, old - 1, len(raw), len(raw) - at])
        out[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
        return bytes(out)
    changed = Parts(list(parts.entries), list(parts.tensors), parts.data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _restructure(rng, changed, keys)
    return changed.bytes(rng.choice([32] * 9 + [1, 8, 64, 4096]))


def _restructure(rng: random.Random, parts: Parts, keys: list[bytes]) -> None:
    way, entries, tensors = rng.random(), parts.entries, parts.tensors
    names = [key for key, _, _ in entries]
    key = rng.choice(keys)
    if way < 0.5:  # another value or type under a key that is read
        place = names.index(key) if key in names else len(entries)
        kind = entries[place][1] if place < len(entries) and rng.random() < 0.6 else None
        kind = rng.choice([*SCALARS, 8, 8, 9, 9, 13]) if kind is None else kind
        entries[place : place + 1] = [(key, kind, payload(rng, kind))]
    elif way < 0.6 and entries:
        entries.append(rng.choice(entries))  # twice
    elif way < 0.7 and entries:
        del entries[rng.randrange(len(entries))]
    elif way < 0.72:
        kind = rng.choice([9, 9, 4, 5])
        entries.append((b"general.alignment", kind, payload(rng, kind)))
    elif tensors:
        place = rng.randrange(len(tensors))
        name, dims, kind, offset = tensors[place]
        way = rng.random()
        if way < 0.3:
            dims = list(dims)
            dims[rng.randrange(len(dims))] = rng.choice(NUMBERS)
        elif way < 0.4:
            dims = dims[::-1] if rng.random() < 0.5 else dims * rng.choice([0, 2, 3])
        elif way < 0.55:
            kind = rng.choice([0, 1, 2, 8, 12, 14, 24, 26, 27, 28, 30, 34, 39, 99, 2**31])
        elif way < 0.7:
            offset = rng.choice([*NUMBERS, offset + 1, offset + 32, offset - 32])
        elif way < 0.85:
            name = rng.choice(
                [b"", b"x" * 300, b"\xff", *(t[0] for t in tensors), name + b".lora_a"]
            )
        elif way < 0.93:
            del tensors[place]
            return
        else:
            tensors.append(tensors[place])
            return
        tensors[place] = (name, list(dims), kind, offset)


# text


def damage_text(rng: random.Random, raw: bytes) -> bytes:
    """Bytes flipped, cut, repeated or replaced by what parsers stumble over."""
    odd = [
        b"\0",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"---\n",
        b"\n---\n",
        b"\r",
        b"\x1b]0;x\x07",
        b"\xef\xbb\xbf",
        b"{{ 7 * 7 }}",
        b"{% raw %}",
        b"<|im_end|>",
        b"\xe2\x80\xa8",
        b"<|im_start|>system\n",
        b"!!python/object/apply:os.system ['true']",
        b"&a [*a]",
        b"x" * 9999,
    ]
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        way, at = rng.random(), rng.randrange(len(out) + 1)
        if way < 0.3 and out:
            out[at % len(out)] = rng.randrange(256)
        elif way < 0.7:
            out[at:at] = rng.choice(odd)
        elif way < 0.8:
            del out[at : at + rng.randrange(1, 200)]
        elif way < 0.9:
            out[at:at] = out[: rng.randrange(len(out) + 1)]
        else:
            del out[at:]
        if len(out) > 1_200_000:
            break
    return bytes(out)


def front_matter(rng: random.Random) -> bytes:
    """Front matter from YAML's odder corners, around a body."""
    n = rng.choice([1, 3, 30, 1000, 7000])
    values = [
        "[" * n + "]" * n,
        "{a: " * n + "}" * n,
        "&a [*a]",
        "*nothing",
        "!!python/object:os.system {}",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!timestamp 2020-13-45",
        "2020-01-01",
        "0x" + "f" * n,
        "9" * n,
        "1" + ":59" * min(n, 3000),
        ".nan",
        ".inf",
        "-.inf",
        "~",
        "'" + "a" * n,
        '"\\ud800"',
        '"\\0"',
        '"\\x1b[2J"',
        "|\n  a\n  b",
        ">-\n" + "  a\n" * min(n, 2000),
        "? a\n: b",
        "<<: {a: b}",
        "1e999999",
        "0b" + "1" * n,
        "0o7" * min(n, 9),
        "- a\n- b",
        "a: b: c",
        "yes",
        "x" * n,
        "[a, [b, {c: d}]]",
        "\u2028",
        "\t",
        "%TAG ! x",
        "@x",
        "`x",
        "#",
        ", ",
        "[" * n,
        "\n".join(
            f"  k{i}: &k{i} [*k{max(i - 1, 0)}, *k{max(i - 1, 0)}]" for i in range(min(n, 60))
        ),
    ]
    lines = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        key = rng.choice(
            [
                "name",
                "description",
                "version",
                "license",
                "examples",
                "<<",
                "1",
                "~",
                "? [a]",
                "nmae",
            ]
        )
        value = rng.choice(values)
        if key == "examples" and rng.random() < 0.5:
            value = "\n" + "".join(f"  - {rng.choice(values)}\n" for _ in range(3))
        lines.append(f"{key}: {value}")
    if rng.random() < 0.2:  # merge keys that refer to each other
        depth = rng.choice([5, 9, 30])
        lines = ["a0: &a0 {x: y}"] + [
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, depth)
        ]
    end = rng.choice(["---\n", "---\n", "--- \n", "...\n", ""])
    return ("---\n" + "\n".join(lines) + "\n" + end + "You are calm.\n").encode("utf-8", "replace")


def template(rng: random.Random, usual: str) -> str:
    """A chat template: the usual one damaged, or one that takes more than it should."""
    if rng.random() < 0.4:
        return damage_text(rng, usual.encode()).decode("utf-8", "replace")
    n = rng.choice([10, 10**3, 10**6, 10**9, 10**12])
    loop = f"{{% for i in range({n}) %}}"
    pieces = [
        loop + "{% endfor %}",
        loop * 3 + "x" + "{% endfor %}" * 3,
        f"{{{{ 'a' * {n} }}}}",
        f"{{{{ 9 ** {n} }}}}",
        f"{{{{ 'a' | center({n}) }}}}",
        f"{{{{ '%{n}d' % 1 }}}}",
        f"{{{{ '{{:>{n}}}'.format(1) }}}}",
        f"{{{{ (1).to_bytes({min(n, 10**10)}, 'big') }}}}",
        f"{{{{ [1] | batch({n}, 'x') | list }}}}",
        f"{{{{ lipsum(n={n}) }}}}",
        f"{{{{ messages | tojson(indent={n}) }}}}",
        "{% set ns = namespace(x='a') %}"
        + loop
        + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ strftime_now(1) }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{% generation %}{% endgeneration %}",
        "{{ " + "(" * min(n, 5000) + "1" + ")" * min(n, 5000) + " }}",
        "{% if x %}" * min(n, 2000),
        "\0",
        "{{ bos_token }}{{ eos_token * 3 }}",
        usual,
    ]
    return "".join(rng.choice(pieces) for _ in range(rng.choice([1, 1, 2])))


# what reads them


class Bench:
    """The whole files that are damaged, and a function for each kind that reads a damaged one."""

    def __init__(self, folder: Path) -> None:
        from superego.base import open_base

        self.folder = folder
        self.base = open_base(str(folder / "base.gguf"))
        self.base_bytes = (folder / "base.gguf").read_bytes()
        self.adapter_bytes = (folder / "adapter.gguf").read_bytes()
        self.base_parts = take_apart(self.base_bytes)
        self.adapter_parts = take_apart(self.adapter_bytes)
        self.damaged = folder / "damaged.gguf"
        self.llm: Any = None

    def live(self) -> Any:
        """The whole tiny base in llama.cpp, loaded once."""
        if self.llm is None:
            from superego.runtime import load

            self.llm = load(self.base, n_ctx=256, threads=1)
        return self.llm

    def run(self, kind: str, number: int, seed: int) -> None:
        """One case; raises SuperegoError for a refusal, anything else is a finding."""
        rng = random.Random(f"{seed} {kind} {number}")
        for other in ("damaged.gguf", "copy.gguf", "damaged.md"):
            (self.folder / other).unlink(missing_ok=True)
        getattr(self, f"run_{kind}")(rng)

    def run_base(self, rng: random.Random) -> None:
        keys = [key for key, _, _ in self.base_parts.entries]
        keys += [b"split.count", b"split.no", b"general.alignment", b"tokenizer.chat_template.x"]
        keys += [b"llama." + k for k in (
            b"rope.freq_base", b"rope.scaling.type", b"rope.scaling.factor", b"expert_count",
            b"attention.key_length", b"attention.value_length", b"attention.sliding_window",
            b"vocab_size", b"pooling_type", b"attention.causal", b"expert_used_count",
            b"rope.scale_linear", b"attention.layer_norm_epsilon", b"attention.clamp_kqv",
            b"rope.scaling.original_context_length", b"attention.max_alibi_bias",
        )]  # fmt: skip
        self.damaged.write_bytes(damage_gguf(rng, self.base_bytes, self.base_parts, keys))
        self.read_base(rng)

    def read_base(self, rng: random.Random) -> None:
        import torch

        from superego.base import open_base
        from superego.converters.shape import read_shape
        from superego.converters.transformer import Base
        from superego.errors import SuperegoError
        from superego.runtime import load
        from superego.state_file import layout
        from superego.template import ChatTemplate, conversation

        model = open_base(str(self.damaged))
        assert model.fingerprint
        assert model.context_length >= 0
        refused = None
        for read in (
            lambda: ChatTemplate(model.header).render(conversation("Be kind.", "Hi")),
            lambda: layout(model.header, "f16"),
            lambda: read_shape(model.header),
            lambda: self._walk(Base(model.header, torch.float32, resident=False)),
            lambda: self._load(load(model, n_ctx=64, threads=1, vocab_only=True)),
            lambda: self._load(load(model, n_ctx=64, threads=1), evaluate=True),
        ):
            try:
                read()
            except SuperegoError as error:
                refused = error
        if refused:
            raise refused

    @staticmethod
    def _walk(base: Any) -> None:
        for index in range(base.shape.n_layer):
            base.layer(index)

    @staticmethod
    def _load(llm: Any, evaluate: bool = False) -> None:
        from superego.prompt import control_tokens
        from superego.runtime import stop_tokens, tokenize

        tokens = tokenize(llm, "<|im_start|>user\nHi")
        stop_tokens(llm)
        control_tokens(llm, "<|im_start|>")
        if evaluate and tokens:
            llm.eval(tokens[:8])
        llm.close()

    def run_adapter(self, rng: random.Random) -> None:
        keys = [key for key, _, _ in self.adapter_parts.entries]
        keys += [b"superego." + k for k in (
            b"blend", b"history", b"references", b"settings", b"calibration.scale", b"kl_recovered",
            b"manifesto", b"manifesto.sha256", b"references.unseen", b"base.fingerprint",
        )]  # fmt: skip
        keys += [
            b"adapter.alora.invocation_tokens",
            b"general.alignment",
            b"adapter.lora.alpha",
        ] * 2
        raw = damage_gguf(rng, self.adapter_bytes, self.adapter_parts, keys)
        self.damaged.write_bytes(raw)
        self.read_adapter(rng)

    def read_adapter(self, rng: random.Random) -> None:
        from click.testing import CliRunner

        import superego
        from superego.adapter import check_fit, mismatches, read_adapter, same_weights
        from superego.adapter_copy import batch_invariant
        from superego.blend import blend
        from superego.cli import main
        from superego.converters.amend import known_replies, settings_of
        from superego.converters.merged_weights import MergedWeights
        from superego.errors import SuperegoError
        from superego.history import blend_parts, history_of, manifesto_of, with_entry
        from superego.pairs import copy_adapter, read_pairs, slot_ranks

        for words in (["inspect", str(self.damaged)], ["log", str(self.damaged), "--json"]):
            result = CliRunner().invoke(main, words, catch_exceptions=False)
            assert result.exit_code in (0, 2), result.exit_code
            assert result.exit_code == 0 or len(result.stderr.strip().splitlines()) == 1
        adapter = read_adapter(self.damaged)
        refused = None

        def attach() -> None:
            check_fit(adapter, self.base.header)
            llm = self.live()
            with superego.attach(llm, self.damaged, rng.choice([1.0, 0.5, -2.0])):
                llm.eval(llm.tokenize(b"hello there"))
            llm.reset()

        copy = self.folder / "copy.gguf"
        for read in (
            lambda: mismatches(adapter, self.base.header),
            lambda: same_weights(adapter, self.base),
            lambda: manifesto_of(adapter),
            lambda: [f"{p['name']} {p['scale']:g}" for p in blend_parts(adapter)],
            lambda: history_of(adapter),
            lambda: with_entry(adapter, "test", ""),
            lambda: settings_of(adapter),
            lambda: known_replies(adapter, self.base.header),
            lambda: [adapter.number(k, 1.0) for k in ("calibration.scale", "kl_recovered")],
            lambda: slot_ranks(adapter),
            lambda: read_pairs(adapter),
            lambda: copy_adapter(adapter, copy, {"superego.history": "[]"}, strength=0.5),
            lambda: batch_invariant([adapter.path], self.folder),
            lambda: blend([(adapter, 0.5), (adapter, 0.25)], copy),
            attach,
        ):
            try:
                read()
            except SuperegoError as error:
                refused = error
        try:
            check_fit(adapter, self.base.header)
            weights = MergedWeights(self.base.header, adapter, 0.7)
            for name in adapter.pairs:
                for _ in weights.parts(name):
                    pass
        except SuperegoError as error:
            refused = error
        if refused:
            raise refused

    def run_manifesto(self, rng: random.Random) -> None:
        from superego.bundled import bundled

        whole = rng.choice(sorted(bundled().values(), key=lambda m: m.name))
        front = f"---\nname: {whole.name}\nversion: 1\nexamples:\n  - Hello?\n---\n"
        raw = (front if rng.random() < 0.7 else "") + whole.body
        self.read_manifesto(damage_text(rng, raw.encode()))

    def run_front_matter(self, rng: random.Random) -> None:
        raw = front_matter(rng)
        self.read_manifesto(damage_text(rng, raw) if rng.random() < 0.3 else raw)

    def read_manifesto(self, raw: bytes) -> None:
        from superego.converters.amend import amended
        from superego.manifesto import read_manifesto
        from superego.template import ChatTemplate, conversation

        path = self.folder / "damaged.md"
        path.write_bytes(raw)
        manifesto = read_manifesto(path)
        for text in (manifesto.name, manifesto.description, manifesto.license, *manifesto.examples):
            text.encode()
        assert manifesto.name.isprintable()
        assert manifesto.name
        assert manifesto.sha256
        # text, never code: it stands in the rendered conversation as it is
        rendered = ChatTemplate(self.base.header).render(conversation(manifesto.body, "Hi"))
        assert manifesto.body in rendered
        assert amended(manifesto, "More.").body.startswith(manifesto.body)

    def run_template(self, rng: random.Random) -> None:
        entries = []
        for key, kind, old in self.base_parts.entries:
            if key == b"tokenizer.chat_template":
                source = template(rng, old[8:].decode()).encode("utf-8", "replace")
                entries.append((key, 8, struct.pack("<Q", len(source)) + source))
            else:
                entries.append((key, kind, old))
        parts = Parts(entries, self.base_parts.tensors, self.base_parts.data)
        self.damaged.write_bytes(parts.bytes())
        from superego.base import open_base
        from superego.runtime import load
        from superego.template import ChatTemplate, conversation

        model = open_base(str(self.damaged))
        found = ChatTemplate(model.header)
        found.render(conversation("Be kind.", "Hi"))
        found.render(conversation(None, "Hi"), reply=False)
        self._load(load(model, n_ctx=64, threads=1, vocab_only=True))

    def run_session(self, rng: random.Random) -> None:
        from superego.manifesto import Manifesto
        from superego.session import open_session, sidecar_path

        whole = self.folder / "whole.session"
        path = self.folder / "damaged.session"
        state, beside = whole.read_bytes(), sidecar_path(whole).read_bytes()
        out = bytearray(state if rng.random() < 0.6 else beside)
        in_state = len(out) == len(state)
        for _ in range(rng.choice([1, 1, 4])):
            at = rng.randrange(min(len(out), 4096))
            if rng.random() < 0.7:
                out[at] = rng.randrange(256)
            else:
                value = rng.choice(NUMBERS) % 2**32
                out[at : at + 4] = value.to_bytes(4, "little")
        if rng.random() < 0.2:
            del out[rng.randrange(len(out)) :]
        path.write_bytes(bytes(out) if in_state else state)
        beside = beside if in_state else bytes(out)
        if in_state and rng.random() < 0.7:  # a sidecar that vouches for the damaged state
            import hashlib

            described = json.loads(beside)
            described["state_bytes"] = len(out)
            described["state_sha256"] = hashlib.sha256(bytes(out)).hexdigest()
            beside = json.dumps(described).encode()
        sidecar_path(path).write_bytes(beside)
        llm = self.live()
        open_session(llm, self.base, path, manifesto=Manifesto("calm", "You are calm."))
        llm.eval(llm.tokenize(b"hello"))
        llm.reset()


KINDS = {
    "base": 0.3, "adapter": 0.25, "manifesto": 0.15, "front_matter": 0.15, "template": 0.07,
    "session": 0.08,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """The whole files: a tiny base, an adapter with all of Superego's metadata, a session."""
    sys.path.append(str(ROOT / "tests"))
    import numpy as np
    from conftest import tiny_model

    from superego.adapter import write_adapter
    from superego.base import open_base
    from superego.exchanges import pack_references
    from superego.history import with_entry
    from superego.manifesto import Manifesto
    from superego.runtime import load
    from superego.session import save_session

    base = open_base(str(tiny_model(folder / "base.gguf")))
    rng = np.random.default_rng(3)
    pairs = {}
    for name in ("attn_output", "ffn_down", "attn_k"):
        for layer in range(2):
            key = f"blk.{layer}.{name}.weight"
            out, width = base.header.tensors[key].shape
            a = rng.standard_normal((4, width)) / 8
            pairs[key] = (
                a.astype(np.float32),
                rng.standard_normal((out, 4)).astype(np.float32) / 8,
            )
    manifesto = Manifesto("calm", "You are calm.\n\nAlways.")
    write_adapter(
        folder / "adapter.gguf",
        "llama",
        pairs,
        {
            "general.name": "calm",
            "superego.manifesto": manifesto.body,
            "superego.manifesto.sha256": manifesto.sha256,
            "superego.base.fingerprint": base.fingerprint,
            "superego.settings": json.dumps({"effort": "quick", "rank": 4, "seed": 0}),
            "superego.references": pack_references(base.header, [([5, 6], [7, 8])] * 3),
            "superego.references.unseen": 1,
            "superego.kl_recovered": 0.5,
            "superego.calibration.scale": 0.8,
            "superego.history": with_entry(None, "amend", "me", text="x"),
        },
    )
    llm = load(base, n_ctx=256, threads=1)
    save_session(llm, base, manifesto, folder / "whole.session")


# the child process, and who watches it


def _memory(peak: bool = False) -> int:
    """MB that this process holds, or held at most since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM" if peak else "VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def worker(folder: Path, kind: str, numbers: Iterator[int], seed: int) -> None:
    """Runs cases and says of each when it begins and how it ends, a line of JSON each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from superego.errors import SuperegoError

    bench = Bench(folder)
    if kind in ("base", "adapter"):
        import torch  # its import is no case's time

        torch.set_num_threads(1)
    if kind in ("adapter", "session"):
        bench.live()
    for number in numbers:
        print(json.dumps({"begin": number}), flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _memory(), time.perf_counter()
        said, problem = "", ""
        try:
            bench.run(kind, number, seed)
        except SuperegoError as error:
            said = str(error)
            if "\n" in said or len(said) > 2000:
                problem = f"not one short line: {said[:200]!r}"
        except BaseException as error:
            lines = traceback.format_exc().strip().splitlines()
            problem = (
                f"{type(error).__name__}: {error}; {' / '.join(s.strip() for s in lines[-7:-1])}"
            )
        seconds, grown = time.perf_counter() - start, _memory(peak=True) - before
        if seconds > SECONDS:
            problem = problem or f"took {seconds:.1f} s"
        if grown > BALLOON:
            problem = problem or f"held {grown} MB more"
        print(
            json.dumps(
                {
                    "end": number,
                    "refused": bool(said),
                    "said": said[:300],
                    "problem": problem[:1500],
                    "seconds": round(seconds, 3),
                    "grown": grown,
                }
            ),
            flush=True,
        )


def _drain(stream: Any, into: list[bytes]) -> None:
    into.append(stream.read())


def watch(folder: Path, kind: str, first: int, last: int, seed: int) -> list[dict[str, Any]]:
    """Runs cases first to last in child processes; a case that ends its process is a finding."""
    found: list[dict[str, Any]] = []
    while first < last:
        command = [sys.executable, __file__, "--worker", str(folder), "--kinds", kind]
        command += ["--range", str(first), str(last), "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            errors: list[bytes] = []
            reader = threading.Thread(target=_drain, args=(child.stderr, errors))
            reader.start()
            begun = first - 1
            hung = False
            while True:
                timer = threading.Timer(60 if begun < first else 4 * SECONDS, child.kill)
                timer.start()
                line = child.stdout.readline()
                hung = not timer.is_alive() and not line
                timer.cancel()
                if not line:
                    break
                try:
                    event = json.loads(line)
                except ValueError:  # what a library prints on stdout
                    continue
                if "begin" in event:
                    begun = event["begin"]
                else:
                    found.append({"kind": kind, **event})
            code = child.wait()
            reader.join()
        done = found[-1]["end"] if found else first - 1
        if done >= last - 1:
            break
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        text = (errors or [b""])[0].decode("utf-8", "replace").strip().splitlines()
        problem = "hung" if hung else f"ended its process: {name}"
        found.append(
            {"kind": kind, "end": max(begun, first), "refused": False, "said": "", "seconds": 0.0,
             "grown": 0, "problem": f"{problem} {' / '.join(text[-6:])}"[:1500]}
        )  # fmt: skip
        first = max(begun, first) + 1
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: cases, how they ended, the slowest and the largest, for each kind."""
    rows = ["| kind | cases | read | refused in one line | findings | slowest | most memory |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind in KINDS:
        of = [f for f in found if f["kind"] == kind]
        if of:
            bad = sum(bool(f["problem"]) for f in of)
            refused = sum(f["refused"] and not f["problem"] for f in of)
            rows.append(
                f"| {kind.replace('_', ' ')} | {len(of):,} | {len(of) - refused - bad:,} | "
                f"{refused:,} | {bad} | {max(f['seconds'] for f in of):.2f} s | "
                f"{max(f['grown'] for f in of)} MB |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--case", metavar="KIND:NUMBER")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--range", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.kinds[0], iter(range(*args.range)), args.seed)
        return
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="superego-fuzz-"))
    try:
        prepare(folder)
        if args.case:
            kind, _, number = args.case.partition(":")
            Bench(folder).run(kind, int(number), args.seed)
            print("read")
            return
        share = sum(KINDS[k] for k in args.kinds)
        found = []
        for kind in args.kinds:
            n = -(-int(args.cases * KINDS[kind] / share * 1000) // 1000)
            found += watch(folder, kind, 0, n, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bad = [f for f in found if f["problem"]]
    if args.json:
        print(json.dumps({"cases": len(found), "findings": bad}))
    else:
        print(table(found))
        print(f"\n{len(found):,} cases in {time.perf_counter() - start:.0f} s, seed {args.seed}")
        for problem, count in Counter(f["problem"][:160] for f in bad).most_common(40):
            first = next(f for f in bad if f["problem"].startswith(problem))
            print(f"\n{count} × `--case {first['kind']}:{first['end']}`: {first['problem']}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

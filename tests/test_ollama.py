"""Ollama: exported folders, and models created over its API.

The server is a double that knows the documented API and refuses everything else: it takes
blobs only under their own hash, and makes models only from blobs that it has.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documented, refused, run, tiny_model
from gguf import GGMLQuantizationType

from superego.adapter import read_adapter, write_adapter
from superego.bundled import bundled
from superego.errors import SuperegoError
from superego.gguf_file import read_header
from superego.modelfile import Modelfile, dropped, quote, read_modelfile
from superego.ollama_server import address, check_name, parse_version
from superego.pairs import read_pairs

# Of POST /api/create, in Ollama's API reference.
FIELDS = {
    "model", "from", "files", "adapters", "template", "license", "system", "parameters",
    "messages", "stream", "quantize",
}  # fmt: skip


class Double(ThreadingHTTPServer):
    """Ollama as its API reference describes it."""

    def __init__(self, version: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = version
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.seen: list[str] = []
        self.wrong: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Double

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _answer(self, status: int, *lines: dict[str, Any]) -> None:
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _digest(self) -> str | None:
        match = re.fullmatch(r"/api/blobs/(sha256:[0-9a-f]{64})", self.path)
        if match is None:
            self.server.wrong.append(f"{self.command} {self.path}")
        return match[1] if match else None

    def do_GET(self) -> None:
        self.server.seen.append(f"GET {self.path}")
        if self.path == "/api/version":
            self._answer(200, {"version": self.server.version})
        else:
            self.server.wrong.append(f"GET {self.path}")
            self._answer(404)

    def do_HEAD(self) -> None:
        self.server.seen.append("HEAD blob")
        digest = self._digest()
        self.send_response(200 if digest in self.server.blobs else 404)
        self.end_headers()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        if length is None:
            self.server.wrong.append("no Content-Length")
        body = self.rfile.read(int(length or 0))
        if self.path == "/api/create":
            self._create(json.loads(body))
            return
        self.server.seen.append("POST blob")
        digest = self._digest()
        if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
            self._answer(400, {"error": "digest mismatch"})
            return
        self.server.blobs[digest] = body
        self._answer(201)

    def _create(self, request: dict[str, Any]) -> None:
        self.server.seen.append("POST create")
        self.server.wrong += [f"field {f}" for f in set(request) - FIELDS]
        refuses = parse_version(self.server.version) >= (0, 34, 1)
        if refuses and request.get("adapters"):
            self._answer(400, {"error": "LoRA adapters are no longer supported"})
            return
        if ("from" in request) == ("files" in request):
            self._answer(200, {"error": "neither 'from' or 'files' was specified"})
            return
        for digest in [*request.get("files", {}).values(), *request.get("adapters", {}).values()]:
            if digest not in self.server.blobs:
                self._answer(400, {"error": f"blob {digest} not found"})
                return
        self.server.created.append(request)
        if request["model"] == "cut":
            self._answer(200, {"status": "writing manifest"})
        elif request["model"] == "bad":
            self._answer(200, {"status": "parsing GGUF"}, {"error": "unknown type"})
        else:
            self._answer(200, {"status": "writing manifest"}, {"status": "success"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    double = Double("0.34.0")
    thread = threading.Thread(target=double.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{double.server_port}")
    yield double
    double.shutdown()
    double.server_close()
    thread.join()
    assert double.wrong == []


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base.gguf", kind=GGMLQuantizationType.Q4_1)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((4, 64)), 0.05 * rng.standard_normal((64, 4)))
    path = tmp_path / "pirate.gguf"
    manifesto = {"superego.manifesto": "Talk like a pirate.", "general.name": "pirate"}
    write_adapter(path, "llama", {"blk.0.attn_output.weight": pair}, manifesto)
    return path


def export(*args: str | Path) -> dict[str, Any]:
    result = run("export", "ollama", *map(str, args), "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def as_ollama_reads(text: str) -> dict[str, str]:
    """Modelfile values by the rules of Ollama's parser, one character at a time.

    A value ends at a line end where, stripped, it is closed: it starts with three quotes and
    ends with three, or starts with one and ends with one, or starts with none.
    """
    found, name, value, reading = {}, "", "", False
    for character in text + "\n":
        if not reading:
            if character in " \t" and name:
                reading, value = True, ""
            elif character.isalpha():
                name += character
        elif character == "\n":
            held = value.strip()
            mark = '"""' if held.startswith('"""') else '"' if held.startswith('"') else ""
            if mark and not (len(held) >= 2 * len(mark) and held.endswith(mark)):
                value += character
                continue
            found[name] = held[len(mark) : len(held) - len(mark)]
            name, reading = "", False
        else:
            value += character
    assert not reading
    return found


@pytest.mark.parametrize(
    "system",
    [
        "Be brief.",
        'Say "hello".\n\nThen """quote""" it, and end with "',
        '""\nstarts with two',
        "# not a comment\nFROM nothing\nSYSTEM none",
        *(p.body for p in bundled().values()),
    ],
)
def test_a_modelfile_is_read_back_as_it_was_meant(system: str, tmp_path: Path) -> None:
    text = Modelfile("/models/a b.gguf", system=system).text()
    assert as_ollama_reads(text) == {"FROM": "/models/a b.gguf", "SYSTEM": system}
    path = tmp_path / "Modelfile"
    path.write_text(text)
    assert read_modelfile(path) == Modelfile("/models/a b.gguf", system=system)


def test_what_a_modelfile_cannot_say_is_refused_or_named() -> None:
    with pytest.raises(SuperegoError, match="line 1 of the manifesto ends with"):
        quote('He said """\nand left.')
    with pytest.raises(SuperegoError, match="cannot name this path"):
        Modelfile("/a\nb").text()
    assert dropped("a\u00a0b\nc\td") == ["\u00a0"]


def test_an_older_ollama_gets_base_and_adapter(
    server: Double, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    said = export(adapter, "--base", base, "-o", out)
    assert said["files"] == ["Modelfile", "adapter.gguf"]
    assert as_ollama_reads(said["Modelfile"]) == {"FROM": str(base), "ADAPTER": "./adapter.gguf"}
    assert read_adapter(out / "adapter.gguf").pairs.keys() == read_adapter(adapter).pairs.keys()
    result = run("ollama", "push", str(out), "team/pirate:v1")
    assert result.stdout.splitlines()[-1] == "success"
    digests = {f.name: f"sha256:{hashlib.sha256(f.read_bytes()).hexdigest()}"
               for f in (base, out / "adapter.gguf")}  # fmt: skip
    assert server.created == [
        {
            "model": "team/pirate:v1",
            "stream": True,
            "files": {"base.gguf": digests["base.gguf"]},
            "adapters": {"adapter.gguf": digests["adapter.gguf"]},
        }
    ]
    assert server.seen.count("POST blob") == 2
    run("ollama", "push", str(out), "again")
    assert server.seen.count("POST blob") == 2  # the server has them


def test_a_scale_goes_into_the_exported_matrices(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export(f"{adapter}:0.5", "--base", base, "-o", out, "--ollama-version", "0.30.0")
    before, after = (read_pairs(read_adapter(p)) for p in (adapter, out / "adapter.gguf"))
    for name, (a, b) in before.items():
        np.testing.assert_allclose(after[name][1], 0.5 * b, atol=1e-4)
        assert np.array_equal(after[name][0], a)


def test_a_newer_ollama_gets_a_merged_model(
    server: Double, base: Path, adapter: Path, tmp_path: Path
) -> None:
    server.version = "0.34.1"
    out = tmp_path / "model"
    said = export(adapter, "--base", base, "-o", out, "--rounding", "nearest")
    assert said["files"] == ["Modelfile", "merged.gguf"]
    assert as_ollama_reads(said["Modelfile"]) == {"FROM": "./merged.gguf"}
    assert read_header(out / "merged.gguf").text("superego.merge.persona") == "pirate"
    assert run("ollama", "push", str(out), "pirate").stdout.splitlines()[-1] == "success"
    (request,) = server.created
    assert list(request["files"]) == ["merged.gguf"]
    assert server.blobs[request["files"]["merged.gguf"]] == (out / "merged.gguf").read_bytes()


def test_a_manifesto_alone_needs_no_adapter_and_no_server(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    said = export("steward", "--base", base, "-o", out, "--system")
    assert said["files"] == ["Modelfile"]
    assert as_ollama_reads(said["Modelfile"]) == {
        "FROM": str(base),
        "SYSTEM": bundled()["steward"].body,
    }


def test_a_base_of_ollamas_own_is_named_not_copied(
    server: Double, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(base.read_bytes())
    manifest = store / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    out = tmp_path / "model"
    said = export(adapter, "--base", "ollama:tiny", "-o", out, "--system")
    assert as_ollama_reads(said["Modelfile"])["FROM"] == "tiny"
    run("ollama", "push", str(out), "mine")
    assert server.created == [
        {"model": "mine", "stream": True, "from": "tiny", "system": "Talk like a pirate."}
    ]


def test_bad_exports_are_one_line_and_leave_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    out = tmp_path / "model"
    files = sorted(tmp_path.iterdir())
    common = ["export", "ollama", str(adapter), "--base", str(base), "-o"]
    assert "no Ollama server answers at http://127.0.0.1:9" in refused(*common, str(out))
    assert "expected one such as 0.34.1" in refused(*common, str(out), "--ollama-version", "new")
    assert "is not an empty folder" in refused(*common, str(tmp_path), "--ollama-version", "0.34.0")
    assert "does not exist" in refused(
        *common, str(tmp_path / "a" / "b"), "--ollama-version", "0.34.0"
    )
    manifesto = tmp_path / "quoting.md"
    manifesto.write_text('He said """\nand left.')
    assert "put any character behind it" in refused(
        "export", "ollama", str(manifesto), "--base", str(base), "-o", str(out), "--system"
    )
    manifesto.unlink()
    assert sorted(tmp_path.iterdir()) == files


def test_bad_pushes_are_one_line(server: Double, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert "no such file" in refused("ollama", "push", str(out), "pirate")
    export(adapter, "--base", base, "-o", out)
    assert "not a model name" in refused("ollama", "push", str(out), "a b")
    for name, said in (("bad", "unknown type"), ("cut", "without 'success'")):
        result = run("ollama", "push", str(out), name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr.splitlines()[-1]
    server.version = "0.35.0"
    before = server.seen.count("POST create")
    assert "takes no adapters" in refused("ollama", "push", str(out), "pirate")
    assert server.seen.count("POST create") == before
    base.unlink()
    assert "no such file, though" in refused("ollama", "push", str(out), "pirate")
    (out / "Modelfile").write_text("FROM x\nTEMPLATE y\n")
    assert "'TEMPLATE' is not" in refused("ollama", "push", str(out), "pirate")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("box:8080", "http://box:8080"),
        ("https://box", "https://box:443"),
        ("http://box/ollama/", "http://box:80/ollama"),
        (":9000", "http://127.0.0.1:9000"),
        ("[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_the_address_is_read_as_ollama_reads_it(
    host: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert address() == expected


def test_names_and_versions() -> None:
    for name in ("pirate", "me/pirate:v1", "host:5000/me/pirate", "a.b-c_d"):
        check_name(name)
    for name in ("", "a b", "../x", "a:b:c", "/x"):
        with pytest.raises(SuperegoError):
            check_name(name)
    assert parse_version("v0.34.1-rc2") == (0, 34, 1)
    assert parse_version("0.35") == (0, 35, 0)


def test_the_documented_commands_run(
    server: Double, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of superego; `ollama` itself is not there."""
    shutil.copy(pirate, tmp_path / "pirate.gguf")
    monkeypatch.chdir(tmp_path)
    commands = [words[1:] for words in documented("ollama.md") if words[0] == "superego"]
    assert [words[0] for words in commands] == ["export", "export", "ollama"]
    for words in commands:
        result = run(*words)
        assert result.exit_code == 0, result.output
    (request,) = server.created
    assert request["model"] == "team/pirate"
    assert list(request["adapters"]) == ["adapter.gguf"]

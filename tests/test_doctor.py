"""Doctor: what it finds here, and that it tells broken installs from whole ones and survives them.

Broken packages are laid in front of the real ones on the children's path.
"""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run, tiny_model

from superego import doctor, found_runtimes, installed, machine
from superego.child import run_module, said_by
from superego.doctor import Examination, examine, lines
from superego.installed import imported, needs

# The real package, but for one call that ends the process, as code for another processor does.
DIES_IN_DECODE = """
import os, signal, sys
here = os.path.dirname(os.path.dirname(__file__))
sys.path.remove(here)
del sys.modules["llama_cpp"]
import llama_cpp
llama_cpp.Llama.eval = lambda *given: os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture(scope="module")
def here() -> Examination:
    return examine()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lays a package in front of the real one, for children."""
    folder = tmp_path / "fakes"

    def lay(name: str, source: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return lay


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a model needs is imported: torch takes seconds."""
    monkeypatch.setattr(installed, "worth_importing", lambda found: ["numpy", "gguf", "llama_cpp"])


def only(found: Examination, level: str = "problem") -> doctor.Finding:
    (one,) = [each for each in found.findings if each.level == level]
    return one


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_this_installation_is_usable(here: Examination) -> None:
    assert here.usable, list(lines(here))
    facts = here.facts
    assert facts["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert facts["imports"]["llama_cpp"]["state version"] == found_runtimes.STATE_VERSION
    assert [d["name"] for d in facts["devices"]["llama.cpp"] if d["is CPU"]] == ["CPU"]
    assert facts["extras"]["convert"]["installed"]
    assert facts["runtimes"][0]["takes"]["adapter"] == "yes"
    assert facts["memory"]["total"] > facts["memory"]["available"] > 0
    built, has = facts["processor"]["llama.cpp built for"], facts["processor"]["features"]
    assert {name for name in built if machine.named(name)} <= set(has)


def test_the_self_test_is_whole_and_takes_seconds(here: Examination) -> None:
    steps = here.facts["self-test"]["steps"]
    names = [step["step"] for step in steps]
    assert names == ["load", "decode", "session", "adapter", "attach", "detach"]
    assert steps[3]["note"] == "compiled"
    assert sum(step["seconds"] for step in steps) < 10


def test_people_get_tables_and_programs_json(
    here: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda base, told: here)
    shown = run("doctor")
    assert shown.exit_code == 0
    assert "xllamacpp's llama-server" in shown.stdout
    assert shown.stdout.rstrip().endswith("usable")
    told = json.loads(run("doctor", "--json").stdout)
    assert told["usable"] is True
    assert told["self-test"]["run"] is True


def test_without_rich_the_findings_are_still_told(
    here: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda base, told: here)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    shown = run("doctor")
    assert shown.exit_code == 0
    assert shown.stdout.rstrip().endswith("usable")
    assert "no tables" in shown.stderr


@pytest.mark.usefixtures("few")
def test_a_missing_shared_library_is_told_with_what_to_do(fake: Any) -> None:
    fake("llama_cpp", "raise RuntimeError('Failed to load shared library libllama.so')")
    found = examine()
    problem = only(found)
    assert problem.about == "llama_cpp"
    assert "Failed to load shared library libllama.so" in problem.text
    assert f"{sys.executable} -m pip install --force-reinstall" in problem.do
    assert "llama-cpp-python>=" in problem.do
    assert found.facts["self-test"] == {"run": False, "why": "llama_cpp: cannot be imported"}
    assert list(lines(found))[-1] == "broken: 1 problem"


def test_a_package_that_ends_the_process_is_named_and_the_others_are_still_tried(fake: Any) -> None:
    fake("llama_cpp", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    found = imported(["click", "llama_cpp", "yaml"])
    assert found["llama_cpp"] == {"error": "the process died by SIGILL", "signal": "SIGILL"}
    assert "version" in found["click"]
    assert "version" in found["yaml"]


def test_a_llama_cpp_that_crashes_in_decode_is_reported_not_suffered(fake: Any) -> None:
    fake("llama_cpp", DIES_IN_DECODE)
    found = Examination({"imports": {name: {"version": "1"} for name in doctor._CORE}})
    doctor._self_test(found)
    problem = only(found)
    assert (problem.about, problem.text) == ("self-test", "decode: the process died by SIGSEGV")
    assert "--no-binary llama-cpp-python" in problem.do
    found.facts["imports"]["llama_cpp"]["built for"] = ["AVX2", "AMX_INT8"]
    doctor._self_test(found)
    assert "-mno-amx-int8" in found.findings[-1].do


def test_logits_that_are_no_numbers_fail_the_self_test(fake: Any) -> None:
    fake(
        "llama_cpp",
        DIES_IN_DECODE.rpartition("llama_cpp.Llama.eval")[0]
        + "import numpy\n"
        + "llama_cpp._internals.LlamaContext.get_logits = lambda self: "
        + "(llama_cpp.llama_cpp.ctypes.c_float * 500)(*[float('nan')] * 500)\n",
    )
    ended = run_module("superego.self_test", ["attach"], 10.0)
    assert ended.said[-1]["step"] == "decode"
    assert "logits are not numbers" in ended.said[-1]["error"]


def test_without_torch_an_adapter_is_made_up_and_the_extra_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = installed.version

    def version(package: str) -> str:
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(installed, "version", version)
    monkeypatch.setattr(installed, "worth_importing", lambda found: ["numpy", "gguf", "llama_cpp"])
    found = examine()
    assert found.usable
    note = next(each for each in found.findings if each.about == "extra convert")
    assert note.level == "note"
    assert "torch" in note.text
    assert note.do == f"{sys.executable} -m pip install 'superego[convert]'"
    steps = found.facts["self-test"]["steps"]
    assert [step["note"] for step in steps if step["step"] == "adapter"] == ["a random one"]
    assert steps[-1]["step"] == "detach"


def test_an_old_gguf_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gguf-0.10.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gguf\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (old,) = [need for need in needs() if not need.fits]
    assert (old.package, old.found, old.wanted) == ("gguf", "0.10.0", ">=0.17")
    monkeypatch.setattr(installed, "imported", lambda modules: {})
    found = Examination()
    doctor._packages(found)
    assert only(found).do == f"{sys.executable} -m pip install 'gguf>=0.17'"


def test_a_section_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_packages", "_self_test"):
        monkeypatch.setattr(doctor, name, lambda found: None)

    def broken(state: int | None) -> None:
        raise ModuleNotFoundError("No module named 'nonsense'", name="nonsense")

    monkeypatch.setattr(found_runtimes, "found_runtimes", broken)
    found = examine()
    problem = only(found)
    assert problem.about == "runtimes"
    assert problem.do.endswith("-m pip install nonsense")
    assert found.facts["folders"]


def test_a_processor_without_what_llama_cpp_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, words = machine.from_cpuinfo("model name : Old\nflags : fpu pni ssse3 avx fma f16c bmi2")
    cpu = {"features": machine.features(words), "AMX permitted": None}
    monkeypatch.setattr(machine, "cpu", lambda: dict(cpu))
    monkeypatch.setattr(machine, "named", lambda feature: feature in machine._LINUX)
    found = Examination({"imports": {"llama_cpp": {"built for": ["AVX", "AVX2", "OPENMP"]}}})
    doctor._processor(found)
    assert "built for AVX2, which this processor does not have" in only(found).text
    assert "--no-binary" in only(found).do


def test_amx_that_the_system_does_not_permit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"features": ["AVX2", "AMX_INT8"], "AMX permitted": False}
    monkeypatch.setattr(machine, "cpu", lambda: dict(cpu))
    found = Examination({"imports": {"llama_cpp": {"built for": ["AVX2", "AMX_INT8"]}}})
    doctor._processor(found)
    assert "does not permit" in only(found).text
    assert only(found).do.startswith("CMAKE_ARGS='-DCMAKE_C_FLAGS=-mno-amx-int8")


def test_processor_features_of_other_machines() -> None:
    name, words = machine.from_cpuinfo(
        "Features\t: fp asimd asimdhp asimddp sve i8mm bf16\nModel : Raspberry Pi 5"
    )
    assert name == "Raspberry Pi 5"
    assert machine.features(words) == [
        "NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE", "bf16",
    ]  # fmt: skip
    name, words = machine.from_sysctl(
        "machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_BF16: 1\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_SME: 0\nhw.optional.neon: 1\n"
    )
    assert name == "Apple M2"
    assert machine.features(words) == ["NEON", "ARM_FMA", "DOTPROD", "bf16"]
    _, words = machine.from_sysctl("machdep.cpu.features: SSE3 AVX1.0 FMA\n")
    assert machine.features(words) == ["SSE3", "AVX", "FMA"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("three")
    whole = machine.folder(tmp_path)
    assert (whole["files"], whole["bytes"], whole["not writable"]) == (1, 5, "")
    assert machine.folder(tmp_path / "not" / "yet")["not writable"] == ""
    assert machine.folder(file)["not writable"]


@pytest.fixture
def ollama_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that answers with the version in the list."""
    version = ["0.30.0"]

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": version[0]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    yield version
    server.shutdown()
    thread.join()
    server.server_close()


def runtime(name: str) -> found_runtimes.Runtime:
    return next(each for each in found_runtimes.found_runtimes() if each.name == name)


def test_ollamas_version_decides_about_adapters(
    ollama_at: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    assert runtime("Ollama").takes["adapter"] == "yes"
    assert "server http://127.0.0.1:" in runtime("Ollama").where
    ollama_at[0] = "0.34.1"
    assert runtime("Ollama").takes["adapter"] == "no"
    assert runtime("Ollama").takes["merged"] == "yes"
    ollama_at[0] = "unheard-of"
    assert runtime("Ollama").takes["adapter"] == "if < 0.34.1"


def test_programs_on_path_and_ollamas_store_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    script(programs / "llama-server", "echo 'version: 6789 (abc1234)' >&2")
    script(programs / "ollama", "echo 'Warning: client version is 0.34.2'")
    script(programs / "lms", "exit 1")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")  # nobody listens there
    store = tmp_path / "store"
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    for tag in ("registry.ollama.ai/library/tiny/latest", "registry.ollama.ai/me/own/1b"):
        (store / "manifests" / tag).parent.mkdir(parents=True)
        (store / "manifests" / tag).write_text("{}")
    assert runtime("llama-server").version == "6789"
    ollama = runtime("Ollama")
    assert (ollama.version, ollama.takes["adapter"]) == ("0.34.2", "no")
    assert any("usable as --base ollama:me/own:1b, ollama:tiny" in note for note in ollama.notes)
    assert any("ollama serve" in note for note in ollama.notes)
    assert runtime("LM Studio").where == str(programs / "lms")
    assert runtime("vLLM").where == ""


def test_a_program_that_hangs_or_fails_says_nothing(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert said_by([str(script(tmp_path / "a", "echo early; sleep 60"))], 0.3) is None
    assert time.monotonic() - begun < 5
    assert said_by([str(script(tmp_path / "b", "echo no; exit 3"))]) is None
    assert said_by([str(tmp_path / "nowhere")]) is None


def test_a_child_that_hangs_is_ended(fake: Any) -> None:
    fake("sleepy", "import time\nfrom superego.child import say\n"
         "def main(given):\n    say(ready=True)\n    time.sleep(60)\n")  # fmt: skip
    ended = run_module("sleepy", [], 0.3)
    assert ended.said == [{"ready": True}]
    assert ended.why == "was not done after 0.3 s"


def test_a_base_is_looked_at_and_run(tmp_path: Path) -> None:
    found = Examination({"self-test": {"run": True}})
    doctor._base(found, str(tiny_model(tmp_path / "base.gguf")))
    assert found.usable
    assert found.facts["base"]["architecture"] == "llama"
    assert [step["step"] for step in found.facts["base in llama.cpp"]["steps"]] == [
        "load the base",
        "decode",
    ]
    doctor._base(found, str(tmp_path / "nowhere.gguf"))
    assert "no such file" in only(found).text

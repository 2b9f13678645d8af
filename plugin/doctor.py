"""Looks over an installation: what is there, what is broken, and what to do about it.

Knows what each finding means to a user. Must not fail itself: whatever a broken package does, it
does in a child. Also runs without the command line: `python -m superego.doctor`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import superego
from superego.child import Ended, run_module
from superego.errors import SuperegoError

_TEST_SECONDS = 10.0
_BASE_SECONDS = 120.0  # to load a large file from a slow disk, and to write a few tokens
_CORE = ("numpy", "gguf", "llama_cpp")  # without one of these nothing runs
_GB = 1e9
_LITTLE = 1e9  # bytes of memory or disk that are worth a word
_CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE")
_NO_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """Something to know. `level` is problem (it is broken), warning or note; `do` what to do."""

    level: str
    about: str
    text: str
    do: str = ""


@dataclass
class Examination:
    """What was found. `facts` are plain values for JSON, by section."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether nothing is broken."""
        return not any(each.level == "problem" for each in self.findings)

    def add(self, level: str, about: str, text: str, do: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(level, about, text, do))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = [asdict(each) for each in self.findings]
        return {"usable": self.usable, "findings": found, **self.facts}


def examine(base: str | None = None, told: Told = lambda label: None) -> Examination:
    """Look at everything, at a base too where one is named. Raises nothing but interrupts."""
    found = Examination()
    begun = time.perf_counter()
    sections: list[tuple[str, Callable[[Examination], None]]] = [
        ("packages", _packages),
        ("processor", _processor),
        ("memory", _memory),
        ("devices", _devices),
        ("runtimes", _runtimes),
        ("folders", _folders),
        ("self-test", _self_test),
    ]
    if base is not None:
        sections.append(("base", lambda found: _base(found, base)))
    for name, look in sections:
        told(name)
        try:
            look(found)
        except Exception as error:  # a broken install may raise anything anywhere
            missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
            found.add(
                "problem",
                name,
                f"could not be looked at: {type(error).__name__}: {_one_line(error)}",
                _pip(missing) if missing else "",
            )
    found.facts["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def _packages(found: Examination) -> None:
    from importlib.metadata import PackageNotFoundError

    from superego.installed import imported, needs, worth_importing

    versions: dict[str, Any] = {
        "superego": superego.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    found.facts["versions"] = versions
    extras: dict[str, Any] = {}
    found.facts["extras"] = extras
    try:
        wanted = needs()
    except PackageNotFoundError:
        wanted = []
        found.add(
            "warning",
            "superego",
            "is on Python's path but not installed: what it needs cannot be checked",
            _pip("-e", str(Path(superego.__file__).resolve().parent.parent)),
        )
    for need in wanted:
        if need.found:
            versions[need.package] = need.found
        state = extras.setdefault(need.extra, {"installed": True, "missing": []})
        if not need.fits:
            state["installed"] = False
            state["missing"].append(need.requirement)
    core = extras.pop("", {})
    for need in wanted:
        if need.fits or (need.extra and not need.found):
            continue
        text = (
            f"{need.found} is installed, {need.wanted} is needed"
            if need.found
            else "is not installed"
        )
        level = "warning" if need.extra else "problem"
        found.add(level, need.package, text, _pip(need.requirement))
    found.facts["requirements"] = core
    for extra, state in extras.items():
        state["install"] = _pip(f"superego[{extra}]")
        if not state["installed"]:
            found.add(
                "note",
                f"extra {extra}",
                f"not installed: {', '.join(state['missing'])} ({_EXTRAS.get(extra, extra)})",
                state["install"],
            )
    modules = worth_importing(wanted) or list(_CORE)
    requirement = {need.module: need.requirement for need in wanted}
    found.facts["imports"] = imports = imported(modules)
    for module, said in imports.items():
        if "error" in said:
            do = _pip("--force-reinstall", "--no-cache-dir", requirement.get(module, module))
            if module == "llama_cpp" and said.get("signal") == "SIGILL":
                do = _rebuild()
            found.add("problem", module, f"cannot be imported: {said['error']}", do)
    llama = imports.get("llama_cpp", {})
    if llama.get("missing"):
        found.add(
            "problem",
            "llama_cpp",
            f"{llama.get('version')} lacks {', '.join(llama['missing'])}",
            _pip("--upgrade", requirement.get("llama_cpp", "llama-cpp-python")),
        )
    installed = versions.get("llama-cpp-python")
    if installed and llama.get("version") and llama["version"] != installed:
        found.add(
            "warning",
            "llama_cpp",
            f"calls itself {llama['version']}, the package that is installed is {installed}: two "
            "copies, or a fork",
            _pip("--force-reinstall", "--no-cache-dir", "llama-cpp-python"),
        )


_EXTRAS = {
    "convert": "compile, amend, move, merge, watch",
    "demo": "the base smollm2",
    "serve": "serve",
    "sources": "tag HTML and PDF files, find dates",
    "ollama": "ollama push",
    "llm": "llm -m persona/NAME",
}


def _processor(found: Examination) -> None:
    from superego import machine

    found.facts["processor"] = cpu = machine.cpu()
    built = found.facts.get("imports", {}).get("llama_cpp", {}).get("built for")
    if not built:
        return
    cpu["llama.cpp built for"] = built
    has = cpu["features"]
    if has is None:
        return
    lacking = [name for name in built if machine.named(name) and name not in has]
    if lacking:
        found.add(
            "problem",
            "processor",
            f"llama.cpp was built for {', '.join(lacking)}, which this processor does not have",
            _rebuild(),
        )
    elif "AMX_INT8" in built and cpu["AMX permitted"] is False:
        found.add(
            "problem",
            "processor",
            "llama.cpp was built for AMX, which the processor names and the system does not permit",
            _rebuild(_NO_AMX),
        )
    slow = [name for name in ("AVX2", "AVX512", "DOTPROD") if name in has and name not in built]
    if slow:
        found.add(
            "note",
            "processor",
            f"llama.cpp was built without {', '.join(slow)}, which this processor has: it would "
            "be faster with",
            _rebuild(),
        )


def _memory(found: Examination) -> None:
    from superego import machine

    found.facts["memory"] = memory = machine.memory()
    available = memory["available"]
    if available is not None and available < _LITTLE:
        found.add(
            "warning",
            "memory",
            f"{available / _GB:.1f} GB are free: little for any model",
            "close other programs",
        )


def _devices(found: Examination) -> None:
    imports = found.facts.get("imports", {})
    llama = imports.get("llama_cpp", {}).get("devices")
    torch = imports.get("torch", {})
    graphics = None if llama is None else [d["name"] for d in llama if not d["is CPU"]]
    found.facts["devices"] = {
        "llama.cpp": llama,
        "torch": torch.get("devices"),
        "torch built for CUDA": torch.get("built for CUDA"),
    }
    if graphics:
        return
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if llama is not None and (apple or shutil.which("nvidia-smi")):
        kind, option = ("Metal", "-DGGML_METAL=on") if apple else ("CUDA", "-DGGML_CUDA=on")
        found.add(
            "note",
            "devices",
            f"llama.cpp uses the processor alone; this machine may have {kind}",
            _rebuild(option),
        )


def _runtimes(found: Examination) -> None:
    from superego.found_runtimes import found_runtimes

    state = found.facts.get("imports", {}).get("llama_cpp", {}).get("state version")
    runtimes = found_runtimes(state)
    found.facts["runtimes"] = [asdict(each) for each in runtimes]
    for runtime in runtimes:
        for note in runtime.notes:
            text, _, do = note.partition("; ")
            found.add("note", runtime.name, text, do)


def _folders(found: Examination) -> None:
    from superego import library, machine

    places = {"temporary files": Path(tempfile.gettempdir())}
    try:
        import platformdirs

        cache = Path(platformdirs.user_cache_dir("superego"))
        places["references"] = cache / "references"
        places["split models"] = cache / "splits"
        places["personas"] = library.folder()
    except ImportError:
        pass  # told as a package
    found.facts["folders"] = folders = {}
    for name, path in places.items():
        state = folders[name] = machine.folder(path)
        if name == "temporary files":
            del state["files"], state["bytes"]  # others' files
        if state["not writable"]:
            found.add(
                "problem" if name == "temporary files" else "warning",
                name,
                f"{path} cannot be written: {state['not writable']}",
                f"free the disk, make it writable, or set {_PLACES[name]} to another folder",
            )
        elif state["free"] is not None and state["free"] < _LITTLE:
            found.add(
                "warning",
                name,
                f"{path}: {state['free'] / _GB:.1f} GB of disk are free",
                f"free the disk, or set {_PLACES[name]} to another folder",
            )


_PLACES = {
    "temporary files": "TMPDIR",
    "references": "XDG_CACHE_HOME",
    "split models": "XDG_CACHE_HOME",
    "personas": "SUPEREGO_PERSONAS",
}


def _self_test(found: Examination) -> None:
    imports = found.facts.get("imports", {})
    broken = [name for name in _CORE if "error" in imports.get(name, {"error": ""})]
    if broken:
        found.facts["self-test"] = {"run": False, "why": f"{', '.join(broken)}: cannot be imported"}
        return
    torch = "version" in imports.get("torch", {})
    ended = run_module("superego.self_test", ["compile" if torch else "attach"], _TEST_SECONDS)
    _steps(found, "self-test", ended)


def _steps(found: Examination, about: str, ended: Ended) -> None:
    """Keep what a child's steps came to; one that failed, or a child that died, is a problem."""
    done = [line for line in ended.said if "step" in line]
    begun = [line["begin"] for line in ended.said if "begin" in line]
    found.facts[about] = {"run": True, "steps": done, "ended": ended.why}
    failed = next((line for line in done if "error" in line), None)
    if failed is not None:
        do = _pip("--force-reinstall", "--no-cache-dir", "llama-cpp-python")
        if failed["step"] == "adapter":
            do = _pip("--upgrade", "--force-reinstall", "superego[convert]")
        found.add("problem", about, f"{failed['step']}: {failed['error']}", do)
    elif ended.why:
        where = begun[-1] if len(begun) > len(done) else ("start" if not begun else "the end")
        found.add("problem", about, f"{where}: {ended.why}", _after(found, ended))


def _after(found: Examination, ended: Ended) -> str:
    """What to do after a child ended like this."""
    built = found.facts.get("imports", {}).get("llama_cpp", {}).get("built for") or []
    if ended.signal in _CRASHES:
        return _rebuild(_NO_AMX if "AMX_INT8" in built else "")
    if ended.signal == "SIGKILL":
        return "the system ended it, for lack of memory probably: close other programs"
    if "not done after" in ended.why:
        return "close other programs and try again; if it stays so, " + _rebuild()
    return _pip("--force-reinstall", "--no-cache-dir", "llama-cpp-python")


def _base(found: Examination, base: str) -> None:
    found.facts["base"] = facts = {"given": base}
    try:
        _base_facts(found, facts, base)
    except SuperegoError as error:
        found.add("problem", "base", str(error))
        return
    if found.facts.get("self-test", {}).get("run"):
        ended = run_module("superego.self_test", ["base", base], _BASE_SECONDS)
        _steps(found, "base in llama.cpp", ended)


def _base_facts(found: Examination, facts: dict[str, Any], base: str) -> None:
    from superego.architectures import ARCHITECTURES
    from superego.base import open_base
    from superego.template import ChatTemplate

    model = open_base(base)
    weights = 0
    for tensor in model.header.tensors.values():
        count = 1
        for n in tensor.shape:
            count *= n
        weights += count
    held = sum(tensor.n_bytes for tensor in model.header.tensors.values())
    compiles = model.architecture in ARCHITECTURES
    facts |= {
        "path": str(model.path),
        "name": model.name,
        "architecture": model.architecture,
        "weights": weights,
        "bytes": held,
        "context": model.context_length,
        "compile supports it": compiles,
    }
    if not compiles:
        found.add(
            "warning",
            "base",
            f"compile does not know architecture '{model.architecture}' "
            f"(it knows {', '.join(ARCHITECTURES)})",
            f"superego chat --base {shlex.quote(base)} --system MANIFESTO, or session, work with "
            "any that llama.cpp loads",
        )
    available = found.facts.get("memory", {}).get("available")
    if available is not None and held > available:
        found.add(
            "warning",
            "base",
            f"has {held / _GB:.1f} GB of weights, and {available / _GB:.1f} GB of memory are free",
            "close other programs, or take a smaller quantization or model",
        )
    facts["takes a system message"] = ChatTemplate(model.header).has_system_role


def _pip(*arguments: str) -> str:
    """The command with this very Python: the `pip` on PATH may be another one's."""
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def _rebuild(options: str = "") -> str:
    """llama.cpp built anew, for this processor."""
    command = _pip(
        "--force-reinstall", "--no-cache-dir", "--no-deps", "--no-binary", "llama-cpp-python",
        "llama-cpp-python",
    )  # fmt: skip
    return f"CMAKE_ARGS={shlex.quote(options)} {command}" if options else command


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:400]


def lines(found: Examination) -> Iterator[str]:
    """The findings, worst first, each in one line; then whether it is usable."""
    order = ("problem", "warning", "note")
    for each in sorted(found.findings, key=lambda f: order.index(f.level)):
        do = f" -> {each.do}" if each.do else ""
        yield f"{each.level}: {each.about}: {each.text}{do}"
    problems = sum(each.level == "problem" for each in found.findings)
    yield "usable" if found.usable else f"broken: {problems} problem{'s' if problems > 1 else ''}"


def main() -> int:
    """Without click and rich, which may be what is broken: findings as lines, or --json."""
    base = None
    arguments = [a for a in sys.argv[1:] if a != "--json"]
    if arguments[:1] == ["--base"] and len(arguments) == 2:
        base = arguments[1]
    elif arguments:
        print("usage: python -m superego.doctor [--json] [--base BASE]", file=sys.stderr)
        return 2
    found = examine(base)
    if "--json" in sys.argv:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(os.linesep.join(lines(found)))
    return 0 if found.usable else 1


if __name__ == "__main__":
    sys.exit(main())

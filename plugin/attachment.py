"""Attach personas to a live `llama_cpp.Llama`, change their scale, take them off again.

Knows llama.cpp's adapter calls, and that any change makes the cached keys and values
stale. Does not know how adapters and sessions are made.
"""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from superego.base import BaseModel, open_base
from superego.errors import SuperegoError
from superego.gguf_file import Header
from superego.loaded import hand_over, load_persona
from superego.persona import Persona, check_persona, read_persona
from superego.session import Session, open_session
from superego.split import read_model

if TYPE_CHECKING:
    from llama_cpp import Llama


class Attachment:
    """An adapter, a session or both on one model. Detaches at the end of a `with` block.

    `adapter` and `session` are None where the persona has none. A session is gone as soon
    as any adapter of the model changes: its keys and values were made without the change.
    """

    def __init__(self, model: _Model, adapter: Persona | None, scale: float) -> None:
        self._model = model
        self.adapter = adapter
        self._loaded = load_persona(model.llm()._model.model, adapter) if adapter else None
        self.session: Session | None = None
        self.scale = scale

    @property
    def attached(self) -> bool:
        """Whether it is still on its model."""
        return self in self._model.attachments or self is self._model.holder

    def set_scale(self, scale: float) -> None:
        """Change the adapter's strength; drops the model's cached keys and values."""
        if not self.attached:
            raise SuperegoError(f"{self._name}: is not attached any more")
        if self.adapter is None:
            raise SuperegoError(f"{self._name}: a session has no scale; only adapters have")
        before, self.scale = self.scale, _finite(scale)
        try:
            self._model.apply()
        except SuperegoError:
            self.scale = before
            raise

    def detach(self) -> None:
        """Take it off; without effect where it is off already."""
        if self.attached:
            self._model.remove([self])

    @property
    def _name(self) -> str:
        if self.adapter is not None:
            return str(self.adapter.path)
        return self.session.name if self.session else "session"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


class _Model:
    """A live model's attachments, in the order they were attached."""

    def __init__(self, llm: Llama) -> None:
        self._llm = weakref.ref(llm)
        self.attachments: list[Attachment] = []  # those with an adapter
        self.holder: Attachment | None = None  # the one whose session is in the cache
        self.header: Header = read_model(Path(llm.model_path))
        self._base: BaseModel | None = None

    def base(self) -> BaseModel:
        if self._base is None:
            self._base = open_base(str(self.header.path))
        return self._base

    def llm(self) -> Llama:
        llm = self._llm()
        if llm is None:
            raise SuperegoError("the model that this adapter was attached to is gone")
        return llm

    def add(self, adapter: Persona, scale: float) -> Attachment:
        attachment = Attachment(self, adapter, scale)
        self.attachments.append(attachment)
        try:
            self.apply()
        except SuperegoError:  # nothing was handed over: those before act on
            self.drop([attachment])
            raise
        return attachment

    def remove(self, gone: list[Attachment]) -> None:
        self.attachments = [a for a in self.attachments if a not in gone]
        self.apply()
        self.drop(gone)

    def drop(self, gone: list[Attachment]) -> None:
        """Free attachments that take no part any more: what is in the cache stays valid."""
        self.attachments = [a for a in self.attachments if a not in gone]
        for attachment in gone:
            if attachment._loaded is not None:
                attachment._loaded.free()

    def restore(self, path: Path, attachment: Attachment | None = None) -> Attachment:
        """Put a session into the cache, behind the adapters that are attached now."""
        attachment = attachment or Attachment(self, None, 1.0)
        active = [(a.adapter, a.scale) for a in self.attachments if a.adapter]
        attachment.session = open_session(self.llm(), self.base(), path, active)
        if attachment.session.note:
            warnings.warn(attachment.session.note, stacklevel=3)
        self.holder = attachment
        return attachment

    def apply(self) -> None:
        """Hand the attachments to llama.cpp and forget what was computed without them."""
        llm = self.llm()
        acting = [(a._loaded, a.scale) for a in self.attachments if a._loaded is not None]
        hand_over(llm._ctx.ctx, [each for each, _ in acting], [scale for _, scale in acting])
        self.holder = None
        llm.reset()
        llm._ctx.kv_cache_clear()


_models: weakref.WeakKeyDictionary[Llama, _Model] = weakref.WeakKeyDictionary()


def attach(llm: Llama, persona: str | Path, scale: float = 1.0) -> Attachment:
    """Put a persona on a live model, beside the adapters already there.

    `persona` is an adapter or a control vector (GGUF), a session file (`.session`) or a folder
    with one of the former, one session or both. Files are checked against the model's own GGUF
    first, and every mismatch is raised as SuperegoError: llama.cpp ends the process on some of
    them. Clears the model's cached keys and values, and with them an earlier session. A session
    that does not fit is rebuilt from its manifesto, with a warning that says why. Use the result
    in a `with` block, or call its `detach`.
    """
    if getattr(llm, "cache", None) is not None:
        raise SuperegoError(
            "this model has a prompt cache, which llama-cpp-python keys on tokens alone: it "
            "would replay another persona's state; call llm.set_cache(None) first"
        )
    if getattr(llm, "lora_path", None):
        raise SuperegoError(
            f"this model was loaded with lora_path={llm.lora_path!r}; load it without and "
            "attach that file too"
        )
    model = _models.get(llm)
    if model is None:
        model = _models[llm] = _Model(llm)
    path, session = _parts(Path(persona))
    attachment = None
    if path is not None:
        checked = read_persona(path)
        check_persona(checked, model.header)
        attachment = model.add(checked, _finite(scale))
    if session is not None:
        try:
            attachment = model.restore(session, attachment)
        except SuperegoError:
            if attachment is not None:
                attachment.detach()
            raise
    if attachment is None:
        raise AssertionError("_parts finds an adapter or a session")
    return attachment


def _parts(persona: Path) -> tuple[Path | None, Path | None]:
    """The adapter and the session that a path stands for; at least one is there."""
    if persona.is_dir():
        found = []
        for suffix in ("gguf", "session"):
            files = sorted(persona.glob(f"*.{suffix}"))
            if len(files) > 1:
                raise SuperegoError(
                    f"{persona}: holds {len(files)} .{suffix} files, expected at most one"
                )
            found.append(files[0] if files else None)
        if not any(found):
            raise SuperegoError(f"{persona}: holds neither an adapter (.gguf) nor a .session")
        return found[0], found[1]
    if persona.suffix == ".session":
        return None, persona
    return persona, None


def attachments(llm: Llama) -> list[Attachment]:
    """The adapters that are attached to a model, in order."""
    model = _models.get(llm)
    return list(model.attachments) if model else []


def detach(llm: Llama) -> None:
    """Take everything off: the model is the bare base again, bit for bit."""
    model = _models.get(llm)
    if model is not None and (model.attachments or model.holder):
        model.remove(list(model.attachments))


def swap(llm: Llama, persona: str | Path, scale: float = 1.0) -> Attachment:
    """Put a persona in the place of all that is attached; on an error nothing has changed."""
    before = attachments(llm)
    scales = [a.scale for a in before]
    if before:
        model = before[0]._model
        for attachment in before:
            attachment.scale = 0.0
        model.apply()
    try:
        new = attach(llm, persona, scale)
    except SuperegoError:
        for attachment, value in zip(before, scales, strict=True):
            attachment.scale = value
        if before:
            before[0]._model.apply()
        raise
    if before:
        # with scale 0 they take no part, so taking them off leaves the new state valid
        new._model.drop(before)
    return new


def set_scale(llm: Llama, scale: float) -> None:
    """Change the strength of the one attached adapter; with several, use each Attachment's."""
    found = attachments(llm)
    if len(found) != 1:
        raise SuperegoError(
            f"set_scale(llm, …) needs exactly one attached adapter, found {len(found)}; "
            "call set_scale on the Attachment that attach returned"
        )
    found[0].set_scale(scale)


def _finite(scale: float) -> float:
    value = float(scale)
    if not -100.0 <= value <= 100.0:  # also refuses NaN
        raise SuperegoError(f"scale {scale!r}: expected a number between -100 and 100")
    return value

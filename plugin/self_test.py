"""The self-test: a tiny random model through everything that a persona needs; doctor's child.

Knows what must hold: logits are numbers, a session gives them back, an adapter changes them and
leaves no trace. Says one line a step. It runs as a child because llama.cpp, built for another
processor, ends the process.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.atomic import temporary_folder
from superego.child import say

if TYPE_CHECKING:
    import numpy as np

STEPS = ("load", "decode", "session", "adapter", "attach", "detach")
_TEXT = "The captain said that the sea"
_TOKENS = 16  # decoded one at a time on a real base


def main(arguments: Sequence[str]) -> None:
    """`compile` or `attach`: a tiny model, with an adapter compiled or random; `base NAME`: that.

    What is imported first is not in the steps' time.
    """
    what, *names = arguments
    for module in ("numpy", "gguf", "llama_cpp"):
        importlib.import_module(module)
    if what == "compile":
        importlib.import_module("superego.converters.compile")
    say(ready=True)
    if what == "base":
        _try_base(names[0])
        return
    with temporary_folder() as folder:
        _Test(folder, compiles=what == "compile").run()


class _Test:
    def __init__(self, folder: Path, compiles: bool) -> None:
        self._folder, self._compiles = folder, compiles
        self._file = folder / "adapter.gguf"

    def run(self) -> None:
        """Every step in order; the first that fails is the last."""
        for name in STEPS:
            say(begin=name)
            begun = time.perf_counter()
            try:
                note = getattr(self, f"_{name}")() or ""
            except Exception as error:  # whatever a broken install raises is the answer
                words = " ".join(str(error).split()) or "no word"
                say(step=name, error=f"{type(error).__name__}: {words}"[:400])
                return
            say(step=name, seconds=round(time.perf_counter() - begun, 3), note=note)

    def _load(self) -> None:
        from gguf import GGMLQuantizationType

        from superego.base import open_base
        from superego.runtime import load
        from superego.tiny_model import tiny_model

        path = self._folder / "tiny.gguf"
        tiny_model(path, context_length=1024, kind=GGMLQuantizationType.Q4_0)
        self._model = open_base(str(path))
        self._llm = load(self._model, n_ctx=512)

    def _decode(self) -> None:
        import numpy as np

        self._bare = self._logits()
        if not np.isfinite(self._bare).all() or not np.ptp(self._bare):
            raise ValueError("logits are not numbers, or all the same")

    def _session(self) -> None:
        import numpy as np

        from superego.manifesto import Manifesto
        from superego.session import open_session, save_session

        path = self._folder / "tiny.session"
        save_session(self._llm, self._model, Manifesto("test", "You are calm."), path)
        token = self._llm.tokenize(b"x", add_bos=False)[:1]
        self._llm.eval(token)
        before = self._last()
        self._llm.reset()
        opened = open_session(self._llm, self._model, path)
        if opened.note:
            raise ValueError(f"the session was not restored: {opened.note}")
        self._llm.eval(token)
        if not np.array_equal(before, self._last()):
            raise ValueError("behind a restored session the logits are others")
        self._llm.reset()

    def _adapter(self) -> str:
        if self._compiles:
            self._compiled()
            return "compiled"
        self._random()
        return "a random one"

    def _compiled(self) -> None:
        from superego.converters.compile import Settings, compile_manifesto
        from superego.manifesto import Manifesto

        settings = Settings("quick", 1, unseen=4, rank=4, ridge=0.4, ridge_ffn=1.5, seed=0, most=12)
        manifesto = Manifesto("test", "You are a pirate and speak of nothing but the sea.")
        compile_manifesto(manifesto, self._model, self._file, settings, use_cache=False)

    def _random(self) -> None:
        import numpy as np

        from superego.adapter import write_adapter

        rng = np.random.default_rng(0)
        pairs = {}
        for name, tensor in self._model.header.tensors.items():
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                rows, columns = tensor.shape
                pairs[name] = (
                    rng.standard_normal((4, columns)).astype(np.float32) / columns**0.5,
                    rng.standard_normal((rows, 4)).astype(np.float32),
                )
        write_adapter(self._file, self._model.architecture, pairs, {})

    def _attach(self) -> None:
        import numpy as np

        import superego

        self._attachment = superego.attach(self._llm, self._file)
        if np.array_equal(self._logits(), self._bare):
            raise ValueError("with an adapter attached the logits are the bare base's")

    def _detach(self) -> None:
        import numpy as np

        self._attachment.detach()
        if not np.array_equal(self._logits(), self._bare):
            raise ValueError("after detaching the logits are not the bare base's, bit for bit")

    def _logits(self) -> np.ndarray:
        self._llm.reset()
        tokens = self._llm.tokenize(_TEXT.encode(), add_bos=False)
        self._llm.eval(tokens)  # many columns at once, then one: two paths in llama.cpp
        self._llm.eval(tokens[:1])
        return self._last()

    def _last(self) -> np.ndarray:
        import numpy as np

        pointer: Any = self._llm._ctx.get_logits()
        return np.ctypeslib.as_array(pointer, shape=(self._llm.n_vocab(),)).copy()


def _try_base(base: str) -> None:
    """Load a base and write a few tokens; the speeds are said."""
    from superego.base import open_base
    from superego.runtime import load

    say(begin="load the base")
    begun = time.perf_counter()
    llm = load(open_base(base), n_ctx=256)
    say(step="load the base", seconds=round(time.perf_counter() - begun, 3), note="")
    say(begin="decode")
    tokens = llm.tokenize(_TEXT.encode(), add_bos=False)
    llm.eval(tokens)
    begun = time.perf_counter()
    for _ in range(_TOKENS):
        llm.eval(tokens[:1])
    seconds = time.perf_counter() - begun
    note = f"{_TOKENS / seconds:.1f} tokens a second"
    say(step="decode", seconds=round(seconds, 3), note=note)

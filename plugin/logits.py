"""Many sequences at once in llama.cpp: greedy replies and full next-token logits.

Knows llama.cpp's batches and sequence ids. Does not know what is compared or why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from superego.errors import SuperegoError
from superego.loaded import hand_over, load_persona
from superego.persona import Persona
from superego.session import put_cells
from superego.state_file import State

if TYPE_CHECKING:
    from llama_cpp import Llama

_BATCH = 512  # tokens handed to llama.cpp at once


class ParallelContext:
    """A context of its own on a loaded model, for up to `n_parallel` sequences.

    All sequences continue one prefix, which is read once, or which a checked state holds.
    Adapters given here act in this context alone. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        llm: Llama,
        prefix: Sequence[int],
        n_parallel: int,
        n_tokens: int,
        adapters: Sequence[tuple[Persona, float]] = (),
        state: State | None = None,
        callback: Any = None,
    ) -> None:
        """`callback` is a ggml_backend_sched_eval_callback that sees the graph's tensors."""
        import llama_cpp as c

        self._c = c
        self._llm = llm  # whose model would be freed with it
        self._n_vocab = llm.n_vocab()
        self._prefix = list(prefix) if state is None else state.tokens
        self._state = state
        params = c.llama_context_default_params()
        params.n_ctx = -(-(len(self._prefix) + n_parallel * n_tokens) // 256) * 256
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = n_parallel + 1
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = llm.n_threads_batch
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if callback is not None:
            params.cb_eval = callback
            self._callback = callback  # must outlive the context
        self._context = c.llama_init_from_model(llm._model.model, params)
        if not self._context:
            raise SuperegoError(f"llama.cpp could not make a context of {params.n_ctx} tokens")
        self._batch = c.llama_batch_init(_BATCH, 0, 1)
        self._memory = c.llama_get_memory(self._context)
        self._loaded = [load_persona(llm._model.model, adapter) for adapter, _ in adapters]
        self.set_scales([scale for _, scale in adapters])

    def apply_scales(self, scales: Sequence[float]) -> None:
        """Give each adapter a scale for what is read from now on; what was read stays."""
        hand_over(self._context, self._loaded, scales)

    def set_scales(self, scales: Sequence[float]) -> None:
        """Give each adapter a scale and read the prefix anew."""
        self.apply_scales(scales)
        c = self._c
        c.llama_memory_clear(self._memory, True)
        if self._state is not None:
            put_cells(self._context, self._state)
            return
        for _ in self._decode([(t, i, 0, False) for i, t in enumerate(self._prefix)]):
            pass

    def _decode(self, cells: list[tuple[int, int, int, bool]]) -> Iterator[np.ndarray]:
        """Decode (token, position, sequence, wanted) cells; yields the wanted ones' logits.

        Each is a float32 view (n_vocab,) that the next one makes invalid.
        """
        c, batch = self._c, self._batch
        for start in range(0, len(cells), _BATCH):
            part = cells[start : start + _BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = wanted
            code = c.llama_decode(self._context, batch)
            if code:
                raise SuperegoError(f"llama.cpp could not read {len(part)} tokens (code {code})")
            for i, cell in enumerate(part):
                if cell[3]:
                    row = c.llama_get_logits_ith(self._context, i)
                    yield np.ctypeslib.as_array(row, shape=(self._n_vocab,))

    def _fork(self, n: int) -> None:
        for sequence in range(1, n + 1):
            self._c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for sequence in range(1, n + 1):
            self._c.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        first: Sequence[int],
        switch: tuple[Sequence[int], Sequence[float]] | None = None,
    ) -> list[np.ndarray]:
        """Logits (n_i, n_vocab) float32 at positions first[i]… of every sequence.

        `switch` holds a position of each sequence, at most first[i], and scales: what is
        before it is read with the scales as they are, what follows with those.
        """
        self._fork(len(sequences))
        start = len(self._prefix)
        cells = [
            (token, start + i, s, i >= first[s - 1])
            for s, sequence in enumerate(sequences, 1)
            for i, token in enumerate(sequence)
        ]
        out = [
            np.empty((len(s) - f, self._n_vocab), np.float32)
            for s, f in zip(sequences, first, strict=True)
        ]
        if switch is not None:
            at, scales = switch
            before = [cell for cell in cells if cell[1] - start < at[cell[2] - 1]]
            for _ in self._decode(before):
                pass
            cells = [cell for cell in cells if cell[1] - start >= at[cell[2] - 1]]
            self.apply_scales(scales)
        wanted = ((s, i) for s, rows in enumerate(out) for i in range(len(rows)))
        for (s, i), row in zip(wanted, self._decode(cells), strict=True):
            out[s][i] = row
        return out

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: set[int]
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Greedy replies (stop token included) and the logits that chose each token."""
        self._fork(len(prompts))
        start = len(self._prefix)
        replies: list[list[int]] = [[] for _ in prompts]
        rows: list[list[np.ndarray]] = [[] for _ in prompts]
        cells = [
            (token, start + i, s, i == len(prompt) - 1)
            for s, prompt in enumerate(prompts, 1)
            for i, token in enumerate(prompt)
        ]
        alive = list(range(len(prompts)))
        while alive:
            for s, row in zip(alive, self._decode(cells), strict=True):
                rows[s].append(row.copy())
                replies[s].append(int(row.argmax()))
            alive = [
                s for s in alive if len(replies[s]) < max_tokens and replies[s][-1] not in stop
            ]
            cells = [
                (replies[s][-1], start + len(prompts[s]) + len(replies[s]) - 1, s + 1, True)
                for s in alive
            ]
        return replies, [np.stack(r) for r in rows]

    def instead(
        self,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        first: Sequence[int],
    ) -> list[np.ndarray]:
        """Logits (n_i, n_vocab) at positions first[i]… of texts behind the prompts just read.

        `greedy` or `read` has read the prompts; what stood behind them is dropped, they are not
        read again.
        """
        cells = []
        for s, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            behind = len(self._prefix) + len(prompt)
            self._c.llama_memory_seq_rm(self._memory, s, behind, -1)
            cells += [(t, behind + i, s, i >= first[s - 1]) for i, t in enumerate(text)]
        rows = [row.copy() for row in self._decode(cells)]
        out = []
        for text, start in zip(texts, first, strict=True):
            n = len(text) - start
            out.append(np.stack(rows[:n]))
            rows = rows[n:]
        return out

    def close(self) -> None:
        """Free the context and its adapters."""
        c: Any = self._c
        if self._context:
            c.llama_batch_free(self._batch)
            c.llama_free(self._context)
            for each in self._loaded:
                each.free()
            self._context = None

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

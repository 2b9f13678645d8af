"""Rounding to a fixed grid so that a small change of the weights survives.

Knows least squares on integers. Does not know files, block layouts or models. Plain
rounding looks at each weight alone: a change of less than half a step is lost. What
matters is the change of the output, so a weight's rounding error is passed on to the
weights whose inputs go with its own (Frantar et al. 2022), and then single levels are
moved as long as that lessens the error.
"""

from __future__ import annotations

import numpy as np

from superego.converters.levels import Grid

_BLOCK = 64  # columns whose errors are passed on within the block first
_DAMPING = 1e-3  # of the mean second moment, added to each


class Feedback:
    """Second moments (in, in) of a matrix's inputs, made ready for rounding its rows.

    Wide matrices keep only the moments within groups of `group` columns.
    """

    def __init__(self, moments: list[np.ndarray]) -> None:
        self._groups = []
        start = 0
        for gram in moments:
            gram = gram.astype(np.float32)
            diagonal = gram.diagonal()
            gram = gram + np.diag(np.full(len(gram), _DAMPING * diagonal.mean() + 1e-12))
            order = np.argsort(-diagonal, kind="stable")  # what matters most is rounded first
            gram = np.ascontiguousarray(gram[np.ix_(order, order)], np.float32)
            inverse = np.linalg.inv(gram.astype(np.float64))
            factor = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
            self._groups.append((start + order, gram, factor))
            start += len(gram)
        self.width = start

    def round(self, target: np.ndarray, grid: Grid, sweeps: int) -> np.ndarray:
        """Levels (n, in) for `target` (n, in) float32 on the grid."""
        levels = grid.levels.astype(np.float32)
        for columns, gram, factor in self._groups:
            step = grid.step[:, columns]
            inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
            wanted = np.ascontiguousarray(target[:, columns])
            offset = grid.offset[:, columns]
            q = _pass_on(wanted, step, inverse, offset, grid, factor)
            error = wanted - (step * q + offset)
            for _ in range(sweeps):
                if not _move(q, error, step, inverse, grid, gram):
                    break
            levels[:, columns] = q
        return levels

    def loss(self, error: np.ndarray) -> np.ndarray:
        """Squared output error that a weight error (n, in) makes: (n,), a row each."""
        total = np.zeros(len(error), np.float32)
        for columns, gram, _ in self._groups:
            part = error[:, columns]
            total += np.einsum("ij,ij->i", part @ gram, part)
        return total


def _pass_on(
    target: np.ndarray,
    step: np.ndarray,
    inverse: np.ndarray,
    offset: np.ndarray,
    grid: Grid,
    factor: np.ndarray,
) -> np.ndarray:
    """Round column after column; what one lacks is made up for by those after it."""
    work = target.copy()
    levels = np.empty_like(work)
    width = work.shape[1]
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = np.empty((len(work), stop - start), np.float32)
        for j in range(start, stop):
            column = work[:, j]
            q = np.clip(np.rint((column - offset[:, j]) * inverse[:, j]), grid.low, grid.high)
            levels[:, j] = q
            errors[:, j - start] = (column - step[:, j] * q - offset[:, j]) / factor[j, j]
            work[:, j + 1 : stop] -= np.outer(errors[:, j - start], factor[j, j + 1 : stop])
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return levels


def _move(
    levels: np.ndarray,
    error: np.ndarray,
    step: np.ndarray,
    inverse: np.ndarray,
    grid: Grid,
    gram: np.ndarray,
) -> int:
    """One sweep: each level in turn to its best, the others fixed. In place; returns moves."""
    moved = 0
    width = levels.shape[1]
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        pull = error @ gram[:, start:stop]  # (n, block)
        for j in range(start, stop):
            wish = pull[:, j - start] / gram[j, j] * inverse[:, j]
            q = np.clip(np.rint(levels[:, j] + wish), grid.low, grid.high)
            change = q - levels[:, j]
            if not change.any():
                continue
            moved += int(np.count_nonzero(change))
            levels[:, j] = q
            change *= step[:, j]
            error[:, j] -= change
            pull -= np.outer(change, gram[j, start:stop])
    return moved

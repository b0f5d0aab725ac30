"""Remedies for a loss that couples rows, tried on its program: what of it can be cut?"""

import dataclasses
import difflib
import functools
from typing import Any

import jax
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

from optaccum._microbatched import microbatched
from optaccum._value_and_grad import value_and_grad
from optaccum.testing import programs
from optaccum.testing.explain import walk
from optaccum.testing.gradients import Loss, apart, flat


def split(loss: Loss, n: int, hoist: bool) -> "Split":
    """Returns the parts of a loss for n microbatches; `hoist` takes out what data make of rows."""
    rows = loss.num_rows
    full, twice, small = (programs.flat(loss, size) for size in (rows, 2 * rows, rows // n))
    walked = walk.Walk(rows, hoist=True)
    walked.run(full.jaxpr, twice.jaxpr, walk.inputs(loss))
    return Split(loss, n, full, small, walked, hoist)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The program of a loss in three parts.

    First comes what the data alone make of several rows, which needs not be cut. Then what is made
    of each row, the model, and last what is made of its results for all rows.
    """

    loss: Loss
    n: int  # microbatches
    full: Any  # the program for all rows, without calls
    small: Any  # the program for a microbatch
    walked: walk.Walk  # through the full one
    hoist: bool
    stacked: bool = False  # whether an axis holds first rows and second rows, not rows and tokens

    @functools.cached_property
    def kind(self) -> str:
        """The remedy: "hoisted", "microbatched" or "statistics", of which nothing helps."""
        if self.hoist and not any(f.kind in walk.COUPLING for f in self.walked.findings):
            return "hoisted"
        return "statistics" if self.walked.inside else "microbatched"

    def error(self, full: np.ndarray, bound: float) -> float:
        """Returns how far the gradient with the remedy is from the full batch's."""
        left = float("inf")
        for each in (self, dataclasses.replace(self, stacked=True)):
            if left > bound:
                left = min(left, apart(each.gradient(), full))
        return left

    def gradient(self) -> np.ndarray:
        """Returns the gradient of the loss with the remedy, f64[P]."""
        trained = self.loss.some(*self.loss.argnums)
        batch = jax.tree.map(jnp.asarray, self.loss.some(*self.loss.rows)), self._cut
        with jax.default_matmul_precision("highest"):
            if self.kind == "hoisted":
                take = value_and_grad(lambda *args: self._model(*args)[0], num_microbatches=self.n)
                return flat(jax.jit(take)(trained, batch)[1])
            return flat(jax.jit(jax.grad(self._in_microbatches))(trained, batch))

    def _in_microbatches(self, trained: Any, batch: Any) -> jax.Array:
        """Returns the loss of the rows that the model gives in microbatches."""
        found = microbatched(self._model, num_microbatches=self.n)(trained, batch)
        env = self._begin(self.full, trained) | self._hoisted
        rows = dict(zip(self._outputs, map(self._back, self._outputs, found), strict=True))
        rest = [e for e in self.full.eqns if not {*e.outvars} & (rows.keys() | env.keys())]
        return self._run(self.full, rest, env | rows, self.full.jaxpr.outvars)[0]

    def _model(self, trained: Any, batch: Any) -> list[jax.Array]:
        """Returns what is made of each row of a microbatch: what all the rest needs."""
        rows, cut = batch
        env = self._begin(self.small, trained | rows)
        for i, (v, x) in enumerate(self._hoisted.items()):
            env[self._small[v]] = self._back(v, cut[i]) if i in cut else x
        whole = self.kind == "hoisted"
        wanted = self.full.jaxpr.outvars if whole else self._outputs
        eqns = [
            b if whole else _with_numbers_of(a, b)
            for a, b in self._alike
            if not {*a.outvars} & self.walked.hoisted.keys() and (whole or self._is_of_rows(a))
        ]
        found = self._run(self.small, eqns, env, [self._small[v] for v in wanted])
        return found if whole else [*map(self._leading, wanted, found)]

    def _run(self, program: Any, eqns: list[Any], env: dict[Any, Any], wanted: Any) -> list[Any]:
        return programs.part(program.jaxpr, eqns, [*env], [*wanted])(*env.values())

    def _begin(self, program: Any, arrays: dict[int, Any]) -> dict[Any, Any]:
        args = jax.tree.leaves(self.loss.arrays | arrays)
        names = (*program.jaxpr.constvars, *program.jaxpr.invars)
        return dict(zip(names, (*program.consts, *args), strict=True))

    def _is_of_rows(self, eqn: Any) -> bool:
        return all(self.walked.known[v].kind in ("row", "const") for v in eqn.outvars)

    @functools.cached_property
    def _alike(self) -> list[tuple[Any, Any]]:
        full, small = self.full.eqns, self.small.eqns
        names = ([e.primitive.name for e in eqns] for eqns in (full, small))
        blocks = difflib.SequenceMatcher(None, *names, autojunk=False).get_matching_blocks()
        return [(full[i + k], small[j + k]) for i, j, size in blocks for k in range(size)]

    @functools.cached_property
    def _small(self) -> dict[Any, Any]:
        """The small program's variables for the full one's."""
        pairs = dict(zip(self.full.jaxpr.invars, self.small.jaxpr.invars, strict=True))
        for a, b in self._alike:
            pairs |= zip(a.outvars, b.outvars, strict=True)
        return pairs

    @functools.cached_property
    def _hoisted(self) -> dict[Any, jax.Array]:
        """What the data alone make of several rows, as far as something else needs it."""
        known, made = self.walked.known, self.walked.hoisted
        others = (e for e in self.full.eqns if not {*e.outvars} & made.keys())
        read = {v for e in others for v in e.invars if not isinstance(v, Literal)}
        eqns = [e for e in self.full.eqns if not any(known[v].active for v in e.outvars)]
        env, wanted = self._begin(self.full, {}), [v for v in made if v in read]
        return dict(zip(wanted, self._run(self.full, eqns, env, wanted), strict=True))

    @functools.cached_property
    def _cut(self) -> dict[int, jax.Array]:
        """The rows of what is hoisted."""
        values, of_rows = self._hoisted.items(), self.walked.hoisted
        return {i: self._leading(v, x) for i, (v, x) in enumerate(values) if of_rows[v]}

    @functools.cached_property
    def _outputs(self) -> list[Any]:
        """What the rest needs of the model."""
        cut = [e for e, _ in self._alike if self._is_of_rows(e)]
        rows = {v for e in cut for v in e.outvars if self.walked.known[v].kind == "row"}
        rest = (v for e in self.full.eqns if e not in cut for v in e.invars)
        found = (v for v in rest if not isinstance(v, Literal) and v in rows)
        return [v for v in dict.fromkeys(found) if v not in self._hoisted]

    def _axis(self, v: Any) -> int:
        (axis,) = walk.axes(v, self._small[v])
        return axis

    def _leading(self, v: Any, x: jax.Array) -> jax.Array:
        """Returns a value with its rows on the first axis, and what they share it with behind."""
        x = jnp.moveaxis(x, self._axis(v), 0)
        rows = self.walked.rows * len(x) // v.aval.shape[self._axis(v)]
        if self.stacked:
            return jnp.moveaxis(x.reshape(-1, rows, *x.shape[1:]), 0, 1)
        return x.reshape(rows, -1, *x.shape[1:])

    def _back(self, v: Any, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 1, 0) if self.stacked else x
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, self._axis(v))


def _with_numbers_of(a: Any, b: Any) -> Any:
    """Returns an equation of the small program with the full one's number of rows."""
    pairs = zip(a.invars, b.invars, strict=True)
    return b.replace(invars=[x if isinstance(x, Literal) else y for x, y in pairs])

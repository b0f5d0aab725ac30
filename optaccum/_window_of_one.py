"""`every_k` 1: every microbatch is a window, so nothing has to be kept."""

import jax
import jax.numpy as jnp

from optaccum import _window
from optaccum._accumulator import Accumulator
from optaccum._gradients import check_fits, dtypes_of_sums
from optaccum._state import AccumulateState, has_sums
from optaccum._trees import cast_like, fast, is_none
from optaccum._window import Microbatch, Sums


class WindowOfOne(Accumulator):
    """`every_k` 1, known at trace time: no sums of gradients, and no conditional.

    A state from a longer window has sums, perhaps of an open window. It is left to Accumulator.
    """

    def for_state(self, state):
        longer = isinstance(state, AccumulateState) and has_sums(state)
        return Accumulator(**vars(self)) if longer else self

    def _open_sums(self, params, dtypes):
        return ()

    def _opens(self, state):
        return True

    def _add(self, state, devices, values, microbatch, total):
        return super()._add(state, devices, values._replace(grads=()), microbatch, total)

    def _mean(self, sums, values, microbatch):
        _, means = super()._mean(sums, values._replace(grads=()), microbatch)
        grads, weight = values.grads, microbatch.weight
        if not self.cast_mean:
            dtypes = dtypes_of_sums(grads, self.accumulator_dtype)
            grads = cast_like(grads, jax.eval_shape(lambda: _window.open_sums(grads, dtypes)))
        mean = grads
        if weight is not None and self.summed and self.use_grad_mean:
            mean, _ = _window.mean(Sums(weight, grads, ()), Sums(None, grads, ()))
        elif weight is not None and not self.summed and not self.use_grad_mean:
            weighted = _window.add(_window.open_sums(grads), grads, Microbatch(weight, opens=True))
            mean = jax.tree.map(lambda s, g: s.astype(jnp.result_type(g)), weighted, grads)
        # No other microbatch has what this one lacks.
        means = jax.tree.map(
            lambda x, mean: None if x is None else mean, values.args, means, is_leaf=is_none
        )
        return mean, means

    def _check_fits(self, call, devices, applied):
        check_fits(call.grads, call.grads if call.params is None else fast(call.params))

    def _release(self, release):
        if release is not None and release is not True:
            raise ValueError(
                "`release` must be None or True with `every_k` 1, which keeps no sums and cannot "
                f"hold, got {release}; build with every_k >= 2 (`release` then overrides the count)"
            )
        return True

    def _inner_args(self, extra_args, grads):
        return self.extra_args.for_inner(extra_args)

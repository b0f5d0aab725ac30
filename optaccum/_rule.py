"""A loss and its rule of differentiation, whose forward pass computes the gradients too."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
import jax.numpy as jnp

from optaccum import _devices, _passes, _window
from optaccum._call import Call, Roles
from optaccum._conditional import hoisted
from optaccum._loop import Loop, Settings
from optaccum._mesh_axes import vary, varying
from optaccum._outputs import check_aux
from optaccum._overwritten import Overwritten, overwritten
from optaccum._trees import strongly_typed

Arrays = dict[int, jax.Array]  # by their place among the leaves of the arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """The loss of a batch as a function of arrays.

    `primal`, `forward` and `backward` are what `jax.custom_vjp` wants. They keep no array: rules
    of differentiation outlive the trace that arrays belong to. So they take what `fun` and
    `weight_fn` close over, too.
    """

    fun: Callable[..., Any]  # `(closed_over, *arrays)` returns the loss of a microbatch
    weight_fn: Any  # the same for its weight, or None
    others: list[Any]  # the leaves of all arguments, None for arrays
    owners: list[int]  # the argument that each leaf belongs to
    titles: list[str]  # what errors call the arguments
    overwrites: list[bool]  # which leaves their gradients replace
    structure: Any  # of the arguments
    roles: Roles  # of the arguments
    varies: list[frozenset[str]]  # the axes of `jax.shard_map` over which each leaf varies
    devices: _devices.Replicated  # they cast what has no rows
    settings: Settings

    def primal(self, arrays: Arrays, closed_over: tuple) -> Any:
        """Returns the value of the loss, by forward passes alone."""
        return self._loop(arrays, closed_over, ())[0]

    def forward(self, arrays: Any, closed_over: Any) -> tuple[Any, Any]:
        """Returns the value, and the gradients of what is differentiated."""
        _passes.check_closed_over(jax.tree.leaves(closed_over))
        trained = tuple(k for k, x in arrays.items() if x.perturbed)
        for k in trained:
            j = self.owners[k]
            if j in (*self.roles.rows, *self.roles.carry):
                role = "split into microbatches" if j in self.roles.rows else "the carry"
                raise TypeError(
                    f"{self.titles[j]} is differentiated, but it is {role}, and only the other "
                    "arguments have gradients; use jax.lax.stop_gradient"
                )
        values = custom_vjp_primal_tree_values((arrays, closed_over))
        arrays, closed_over = jax.tree.map(jnp.asarray, values)  # JAX 0.7.2 hands on numbers
        return self._loop(arrays, closed_over, trained)

    def backward(self, grads: Arrays, cotangents: Any) -> tuple[Any, Any]:
        """Returns the cotangents of the arrays, and none of what the functions close over."""
        of_loss, of_aux = cotangents if self.settings.has_aux else (cotangents, ())
        for x in jax.tree.leaves(of_aux):
            if not isinstance(x, SymbolicZero) and x.dtype != jax.dtypes.float0:
                raise TypeError(
                    "`aux` of optaccum.microbatched_loss is differentiated, but only the loss has "
                    "a derivative; add to the loss inside `fun` what you differentiate"
                )
        found: dict[int, Any] = dict.fromkeys(self.places)
        if not isinstance(of_loss, SymbolicZero):
            found |= {k: self._scaled(k, g, of_loss) for k, g in grads.items()}
        return found, None

    def _scaled(self, k: int, g: jax.Array, cotangent: jax.Array) -> jax.Array:
        """Returns the gradient of leaf k times the cotangent of the loss, rounded once."""
        if self.overwrites[k]:
            return g
        wide = _window.times(g.astype(_window.at_least_float32(g.dtype)), cotangent)
        # What all devices share has the sum of their gradients.
        if axes := tuple(varying(wide) - self.varies[k]):
            with jax.named_scope("optaccum.reduce"):
                wide = lax.psum(wide, axes)
        return wide.astype(g.dtype)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which rows vary."""
        rows = [x for x, j in zip(self.varies, self.owners, strict=True) if j in self.roles.rows]
        return tuple(sorted(frozenset().union(*rows)))

    @property
    def places(self) -> list[int]:
        """The leaves that are arrays."""
        return [k for k, x in enumerate(self.others) if x is None]

    def arguments(self, arrays: Arrays) -> list[Any]:
        """Returns the arguments, whose arrays without rows vary over the devices."""
        leaves = list(self.others)
        for k, x in arrays.items():
            inexact = jnp.issubdtype(x.dtype, jnp.inexact)
            casts = inexact and self.owners[k] not in self.roles.rows
            carried = self.owners[k] in self.roles.carry
            leaves[k] = vary(self.devices.vary(x), self.axes) if casts or carried else x
        return self.structure.unflatten(leaves)

    def arrays(self, args: Sequence[Any]) -> Arrays:
        """Returns the arrays of arguments, of the batch or of a microbatch."""
        leaves = jax.tree.leaves(args)
        return {k: leaves[k] for k in self.places}

    def _loop(self, arrays: Arrays, closed_over: tuple, trained: tuple[int, ...]) -> tuple:
        """Returns the value and the gradients of leaves."""
        args = self.arguments(arrays)
        params = {k: x for k, x in self.arrays(args).items() if k in trained}
        of_fun, of_weight, count = closed_over

        def differentiate(*args):
            def value(params):
                return self.fun(of_fun, *(self.arrays(args) | params).values())

            if not trained:
                return value({}), {}
            return jax.value_and_grad(value, has_aux=self.settings.has_aux)(params)

        def weight(*args):
            return self.weight_fn(of_weight, *self.arrays(args).values())

        loop = Loop(
            settings=self.settings,
            args=args,
            roles=self.roles,
            params=params,
            differentiate=differentiate,
            weight_fn=None if self.weight_fn is None else weight,
            devices=self.devices,
            overwritten=Overwritten.among((self.overwrites[k] for k in params), self.axes),
            count=count,
        )
        return loop()


def run(
    call: Call,
    fun: Callable[..., Any],
    weight_fn: Callable[..., Any] | None,
    devices: _devices.Replicated,
    settings: Settings,
    count: jax.Array | None,
) -> Any:
    """Returns the value of a call. The functions are by position."""
    n, roles = settings.n, call.roles
    args = roles.split(call.args, n)
    for j in (*roles.keys, *roles.carry):  # raw keys may be NumPy's
        args[j] = jax.tree.map(strongly_typed, args[j])
    leaves, structure = jax.tree.flatten(args)
    rule = Rule(
        fun=fun,
        weight_fn=weight_fn,
        others=[None if isinstance(x, jax.Array) else x for x in leaves],
        owners=[j for j, tree in enumerate(args) for _ in jax.tree.leaves(tree)],
        titles=[call.title(j) for j in range(len(args))],
        overwrites=overwritten(args),
        structure=structure,
        roles=roles,
        varies=[varying(x) if isinstance(x, jax.Array) else frozenset() for x in leaves],
        devices=devices,
        settings=settings,
    )
    arrays = rule.arrays(args)
    first = roles.microbatch(rule.arguments(arrays), jnp.int32(0), n)
    of_fun, fun_closes_over = _of_arrays(rule, fun, first, settings.has_aux)
    of_weight, weight_closes_over = _of_arrays(rule, weight_fn, first)
    rule = dataclasses.replace(rule, fun=of_fun, weight_fn=of_weight)
    call_rule = jax.custom_vjp(rule.primal)
    call_rule.defvjp(rule.forward, rule.backward, symbolic_zeros=True)
    return call_rule(arrays, (fun_closes_over, weight_closes_over, count))


def _of_arrays(
    rule: Rule, fun: Callable[..., Any] | None, first: list[Any], has_aux: bool = False
) -> tuple[Any, list]:
    """Returns `fun` as `(closed_over, *arrays)`, and what it closes over.

    A result that is known when `fun` is traced stays as it is.
    """
    if fun is None:
        return None, []
    found = []

    def flat(*arrays):
        leaves, structure = jax.tree.flatten(first)
        for k, x in zip(rule.places, arrays, strict=True):
            leaves[k] = x
        results = fun(*structure.unflatten(leaves))
        if has_aux:
            check_aux(results[1:])
        leaves, structure = jax.tree.flatten(results)
        known = [None if isinstance(x, jax.Array) else x for x in leaves]
        found[:] = known, structure
        return [x for x in leaves if isinstance(x, jax.Array)]

    run, closed_over, _ = hoisted(flat, *rule.arrays(first).values())
    known, structure = found

    def of_arrays(closed_over, *arrays):
        traced = iter(run(closed_over, *arrays))
        return structure.unflatten([next(traced) if x is None else x for x in known])

    return of_arrays, closed_over

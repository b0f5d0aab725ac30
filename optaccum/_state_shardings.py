"""Shardings of an optimizer's state: parameter-shaped leaves follow their parameter."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import optax

from optaccum._mesh_axes import unreduced, varying
from optaccum._reduce_axes import AxisError
from optaccum._state import AccumulateState
from optaccum._trees import fast, is_none
from optaccum._validate import check_transformation, leaf_name


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    """Return the shardings of `tx.init(params)`, leaf by leaf, without running it.

    A leaf that belongs to the parameter p, sharded like s, gets::

        s                  in the shape of p, such as sums of gradients and moments
        (None, ..., *s)    with more axes in front, such as the history of L-BFGS
        replicated         in any other shape, such as factored moments

    and every other leaf is replicated. Pass `NamedSharding`s for `jax.jit` and for templates of
    checkpoints. For `jax.shard_map` pass specs, under `jax.set_mesh` if there are `reduce_axes`,
    whose sums get an axis of devices in front.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate, state_shardings
    >>> tx = accumulate(4, optax.sgd(0.1, momentum=0.9))
    >>> rows = {"w": jax.P("data", None)}
    >>> specs = state_shardings(tx, {"w": jnp.ones((8, 4))}, rows)
    >>> specs.grad_sum == rows, specs.inner_state[0].trace == rows, specs.mini_step == jax.P()
    (True, True, True)

    The state of replicated parameters can be sharded (ZeRO-2). Then sums and moments take 1/n of
    the memory on each of n devices, and only a release gathers::

        tx = accumulate(4, optax.adam(1e-3))
        sharded = state_shardings(tx, params, jax.NamedSharding(mesh, jax.P("data")))
        state = jax.jit(tx.init, out_shardings=sharded)(params)
        step = jax.jit(step, out_shardings=(replicated, sharded))

    To shard the sums alone take `state_shardings(tx, params)._replace(grad_sum=sharded.grad_sum)`
    and gather the mean, or parameters and moments are gathered instead::

        gather = optax.stateless(lambda g, _: jax.lax.with_sharding_constraint(g, replicated))
        tx = accumulate(4, optax.chain(gather, optax.adam(1e-3)))

    Under explicit sharding such a link calls `jax.sharding.reshard`. Let it end `inner` (or begin
    it, for sums alone), and reshard gradients to `sharded.grad_sum` before each update.

    Args:
        tx: An Optax transformation that `optax.tree.map_params` can take apart.
        params: The parameters, or `jax.ShapeDtypeStruct`s of them.
        shardings: `NamedSharding`s over one mesh or `PartitionSpec`s, a tree like `params` or a
            prefix of it. None for the `.sharding` of each parameter.

    Returns:
        A tree like `tx.init(params)` of `NamedSharding`s or, if `shardings` are specs, of specs.

    Raises:
        TypeError: if `tx` is not a transformation, or a sharding is of another kind.
        ValueError: if trees or meshes differ, or if `reduce_axes` of an :func:`accumulate` are
            not axes of the mesh, or Auto axes of `NamedSharding`s.
    """
    check_transformation("`tx`", tx)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    layout, found = _layout(fast(shapes), fast(shardings)), []

    def trace(params):
        state = jax.tree.map(jnp.asarray, tx.init(params))
        states = optax.tree.get_all_with_path(state, AccumulateState.__name__)
        found[:] = layout.of_state(tx, state), any(jnp.ndim(each.weight) for _, each in states)
        return ()

    named = isinstance(layout.replicated, NamedSharding)
    mesh = layout.replicated.mesh.abstract_mesh if named else jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(mesh):
        try:
            jax.eval_shape(trace, shapes)
            specs, per_device = found
            waits = any(getattr(s, "unreduced", ()) for s in jax.tree.leaves(specs))
            per_device |= waits and not named
        except AxisError:  # this JAX may have no other way for an Explicit axis
            if named or mesh.empty:
                raise
            per_device = True
        if per_device:  # in `jax.shard_map` types say which leaves vary
            mapped = jax.shard_map(trace, in_specs=PartitionSpec(), out_specs=PartitionSpec())
            jax.eval_shape(mapped, shapes)
    return found[0]


class _Layout(NamedTuple):
    """Shape and sharding of each parameter by its path, and the replicated sharding."""

    parameters: dict[Any, tuple[Any, Any]]
    replicated: Any

    def of_state(self, tx: optax.GradientTransformation, state: Any) -> Any:
        """Returns the shardings of a fresh state, by the types of its leaves."""
        try:
            return optax.tree.map_params(
                tx,
                functools.partial(jax.tree_util.tree_map_with_path, self.of_leaf),
                state,
                transform_non_params=functools.partial(_shard, self.replicated, 0),
                is_leaf=lambda _: True,  # a whole tree like the parameters at once
            )
        except IndexError:  # an `init` that needs a leaf, as `optax.lbfgs` has
            return jax.tree_util.tree_map_with_path(self.of_suffix, state)

    def of_leaf(self, path: tuple, x: Any) -> Any:
        """Returns the sharding of `x` by its path in a tree like the parameters."""
        # A state may keep several leaves for one parameter, or none for a subtree.
        owners = (self.parameters.get(path[:n]) for n in range(len(path), -1, -1))
        p, sharding = next(filter(None, owners), (x, self.replicated))
        extra = x.ndim - p.ndim
        if x.shape[extra:] == p.shape:
            return _shard(sharding, extra, x)
        return _shard(self.replicated, 0, x)

    def of_suffix(self, path: tuple, x: Any) -> Any:
        """Fallback: matches a parameter by the end of a path in the whole state."""
        suffixes = (path[n:] for n in range(len(path) + 1))
        return self.of_leaf(next((s for s in suffixes if s in self.parameters), path), x)


def _shard(sharding: Any, extra: int, x: Any) -> Any:
    """Returns the sharding of `x`, which has `extra` axes in front and may vary or be unreduced."""
    spec = sharding if isinstance(sharding, PartitionSpec) else sharding.spec
    entries: list[Any] = [None] * extra + list(getattr(spec, "partitions", spec))
    used = set(jax.tree.leaves(entries))
    mesh = jax.sharding.get_abstract_mesh()
    if axes := [axis for axis in mesh.axis_names if axis in varying(x)]:
        if used & set(axes) and isinstance(sharding, PartitionSpec):
            raise ValueError(
                f"a parameter is sharded as {spec}, over {sorted(used & set(axes))} of "
                "`reduce_axes`; in jax.shard_map all its devices must have it whole"
            )
        # Each device has whole sums. In a PartitionSpec () is None, and ("data",) is "data".
        entries = [tuple(a for a in jax.tree.leaves(e) if a not in axes) for e in entries]
        entries[:1] = [tuple(axes)]
    waiting = unreduced(x) - used
    spec = PartitionSpec(*entries, unreduced=waiting, reduced=spec.reduced - waiting)
    return spec if isinstance(sharding, PartitionSpec) else sharding.update(spec=spec)


def _layout(params: Any, shardings: Any) -> _Layout:
    """Returns the layout of parameters with these shardings, after checking them."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        wanted = jax.tree.broadcast(shardings, params, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            "`shardings` must be a tree like `params`, or a prefix of it such as one for all, got "
            f"{jax.tree.structure(shardings)} for {structure}"
        ) from error
    parameters, mesh = {}, None
    for (path, x), s in zip(leaves, structure.flatten_up_to(wanted), strict=True):
        name = f"the sharding of parameter leaf {leaf_name(path)}"
        if not isinstance(s, NamedSharding | PartitionSpec):
            raise TypeError(
                f"{name} must be a NamedSharding or a PartitionSpec, got {s!r}; pass `shardings`"
            )
        found = s.mesh if isinstance(s, NamedSharding) else None
        if parameters and found != mesh:
            raise ValueError(
                f"{name} is over {found}, but others are over {mesh}; use one mesh, or specs only"
            )
        parameters[path], mesh = (x, s), found
    spec = PartitionSpec()
    return _Layout(parameters, spec if mesh is None else NamedSharding(mesh, spec))

"""Where an optimizer's state lies: what belongs to a parameter as it does, the rest everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import optax

from optaccum._mesh_axes import unreduced, varying
from optaccum._reduce_axes import AxisError
from optaccum._validate import check_transformation, leaf_name


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    """Return the shardings of `tx.init(params)`, leaf by leaf, without running it.

    A leaf of the state that belongs to the parameter p, sharded like s, is given::

        s                  in the shape of p: the sums of gradients, the optimizer's moments
        (None, ..., *s)    with more axes before it: a history, as L-BFGS keeps one
        replicated         in any other shape (factored moments), as are counters and weights.

    For `out_shardings` and `in_shardings` of `jax.jit`, and for the template that a checkpoint is
    restored into, pass `NamedSharding`s; for `jax.shard_map` specs, and with `reduce_axes` do it
    under `jax.set_mesh`: there the parts of a device get its axis in front.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate, state_shardings
    >>> tx = accumulate(4, optax.sgd(0.1, momentum=0.9))
    >>> rows = {"w": jax.P("data", None)}
    >>> specs = state_shardings(tx, {"w": jnp.ones((8, 4))}, rows)
    >>> specs.grad_sum == rows, specs.inner_state[0].trace == rows, specs.mini_step == jax.P()
    (True, True, True)

    The state need not be sharded like the parameters. Where these are replicated, sums and moments
    divided over n devices (ZeRO-2) take 1/n of the memory on each, and only a release gathers::

        tx = accumulate(4, optax.adam(1e-3))
        divided = state_shardings(tx, params, jax.NamedSharding(mesh, jax.P("data")))
        state = jax.jit(tx.init, out_shardings=divided)(params)
        step = jax.jit(step, out_shardings=(everywhere, divided))

    To divide the sums alone take `state_shardings(tx, params)._replace(grad_sum=divided.grad_sum)`
    and gather first in `inner`, or parameters and moments are gathered instead of one mean::

        gather = optax.stateless(lambda g, _: jax.lax.with_sharding_constraint(g, everywhere))
        tx = accumulate(4, optax.chain(gather, optax.adam(1e-3)))

    Under explicit sharding types say where everything is: let `inner` end (for sums alone, begin)
    with such a link that calls `jax.sharding.reshard`, and reshard gradients to `divided.grad_sum`
    before they are passed.

    Args:
        tx: an Optax transformation, with or without an :func:`accumulate` in it, that
            `optax.tree.map_params` can take apart.
        params: the parameters, or `jax.ShapeDtypeStruct`s of them.
        shardings: a tree like `params`, or a prefix of it such as one for all, of `NamedSharding`s
            over one mesh or of `PartitionSpec`s. None for the `.sharding` of each parameter.

    Returns:
        A tree like `tx.init(params)` of `NamedSharding`s, or of specs if `shardings` are specs.

    Raises:
        TypeError: if `tx` is no transformation, or a parameter's sharding is of another kind.
        ValueError: if the trees, or the meshes of two parameters, differ; if `reduce_axes` of an
            :func:`accumulate` are not axes of the mesh, or are Auto ones of `NamedSharding`s.
    """
    check_transformation("`tx`", tx)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    trained, shardings = (  # lookahead's slow copy has no state
        tree.fast if isinstance(tree, optax.LookaheadParams) else tree
        for tree in (shapes, shardings)
    )
    parameters, everywhere = _checked(trained, shardings)

    def place(path, x):
        # By path: a state may keep several leaves for one parameter, or none for a subtree.
        owners = (parameters.get(path[:n]) for n in range(len(path), -1, -1))
        p, s = next(filter(None, owners), (x, everywhere))
        extra = x.ndim - p.ndim
        if extra < 0 or x.shape[extra:] != p.shape:
            return _place(everywhere, 0, x)
        return _place(s, extra, x)

    def place_by_suffix(path, x):
        """As `place`, where nobody knows which part of a state is a tree like the parameters."""
        own = (path[n:] for n in range(len(path) + 1) if path[n:] in parameters)
        return place(next(own, path), x)

    placed, waiting = [], []

    def trace(params):
        state = jax.tree.map(jnp.asarray, tx.init(params))
        waiting[:] = filter(unreduced, jax.tree.leaves(state))
        try:
            shardings = optax.tree.map_params(
                tx,
                lambda tree: jax.tree_util.tree_map_with_path(place, tree),
                state,
                transform_non_params=lambda x: _place(everywhere, 0, x),
                is_leaf=lambda _: True,  # a whole tree like the parameters at once
            )
        except IndexError:  # an `init` that needs a leaf, such as that of `optax.lbfgs`
            shardings = jax.tree_util.tree_map_with_path(place_by_suffix, state)
        placed[:] = [shardings]
        return ()

    if isinstance(everywhere, NamedSharding):
        with jax.sharding.use_abstract_mesh(everywhere.mesh.abstract_mesh):
            jax.eval_shape(trace, shapes)
        return placed[0]
    # Specs are for `jax.shard_map`, where alone the types tell what a device has of its own.
    try:
        jax.eval_shape(trace, shapes)
        has_parts = bool(waiting)
    except AxisError:
        if jax.sharding.get_abstract_mesh().empty:
            raise
        has_parts = True
    if has_parts:
        mapped = jax.shard_map(trace, in_specs=PartitionSpec(), out_specs=PartitionSpec())
        jax.eval_shape(mapped, shapes)
    return placed[0]


def _place(sharding: Any, extra: int, x: Any) -> Any:
    """Returns where the leaf `x` of a state lies, with `extra` axes before those of `sharding`."""
    spec = sharding if isinstance(sharding, PartitionSpec) else sharding.spec
    entries: list[Any] = [None] * extra + list(getattr(spec, "partitions", spec))
    used = set(jax.tree.leaves(tuple(entries)))
    mesh = jax.sharding.get_abstract_mesh()
    if parts := [axis for axis in mesh.axis_names if axis in varying(x)]:
        if used & set(parts):
            raise ValueError(
                f"a parameter is sharded as {spec}, over {sorted(used & set(parts))} of "
                "`reduce_axes`; in jax.shard_map all its devices must have it whole"
            )
        entries[:1] = [parts[0] if len(parts) == 1 else tuple(parts)]  # the axis of a device's own
    waiting = unreduced(x) - used
    kinds = {"unreduced": waiting, "reduced": getattr(spec, "reduced", frozenset()) - waiting}
    spec = PartitionSpec(*entries, **{kind: axes for kind, axes in kinds.items() if axes})
    if isinstance(sharding, PartitionSpec):
        return spec
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _checked(params: Any, shardings: Any) -> tuple[dict[Any, tuple[Any, Any]], Any]:
    """Returns shape and sharding of each parameter by its path, and the replicated sharding."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        wanted = jax.tree.broadcast(shardings, params, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            "`shardings` must be a tree like `params`, or a prefix of it such as one for all, got "
            f"{jax.tree.structure(shardings)} for {structure}"
        ) from error
    checked, mesh = {}, None
    for (path, x), s in zip(leaves, structure.flatten_up_to(wanted), strict=True):
        name = f"the sharding of parameter leaf {leaf_name(path)}"
        if not isinstance(s, NamedSharding | PartitionSpec):
            raise TypeError(
                f"{name} must be a NamedSharding or a PartitionSpec, got {s!r}; pass `shardings`"
            )
        found = s.mesh if isinstance(s, NamedSharding) else None
        if checked and found != mesh:
            raise ValueError(
                f"{name} is over {found}, but others are over {mesh}; use one mesh, or specs only"
            )
        checked[path], mesh = (x, s), found
    return checked, PartitionSpec() if mesh is None else NamedSharding(mesh, PartitionSpec())

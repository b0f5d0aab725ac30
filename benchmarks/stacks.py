"""Models with a stack of layers, in the forms that people write, and some without a stack.

A form takes sizes and returns `(loss_fn, init)`: a mean over rows of token ids, and the function
that makes the parameters. `SCANNED` have their layers in a scan, `OTHERS` do not.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import equinox as eqx
from flax import linen as nn, nnx
import jax
from jax import lax
import jax.numpy as jnp


class Sizes(NamedTuple):
    layers: int
    width: int
    hidden: int
    vocabulary: int


Form = tuple[Callable[..., Any], Callable[[], Any]]


def stack(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape) * 0.1


def table(sizes: Sizes) -> jax.Array:
    return stack(sizes.vocabulary, sizes.width)


def matrices(sizes: Sizes, *experts: int) -> Any:
    layers, width, hidden, _ = sizes
    return {
        "a": stack(layers, *experts, width, hidden),
        "b": stack(layers, *experts, hidden, width),
    }


def layer(h: Any, w: Any) -> Any:
    return h + jnp.tanh(h @ w["a"]) @ w["b"], None


def loss_of(h: Any, params: Any) -> Any:
    return jnp.mean((h @ params["table"].T) ** 2)


def through(layer: Any, params: Any, ids: Any) -> Any:
    return loss_of(lax.scan(layer, params["table"][ids], params["layers"])[0], params)


scanned = functools.partial(through, jax.checkpoint(layer))


def in_bfloat16(params: Any, ids: Any) -> Any:
    """All parameters are cast outside of the scan."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return scanned(narrow, ids).astype(jnp.float32)


def swap(params: Any) -> Any:
    return params | {"layers": jax.tree.map(lambda p: jnp.moveaxis(p, 1, 0), params["layers"])}


def in_stages(params: Any, ids: Any) -> Any:
    """The stack is divided into stages, a scan in a scan."""

    def stage(h, w):
        return lax.scan(jax.checkpoint(layer), h, w)[0], None

    stages = jax.tree.map(lambda p: p.reshape(2, -1, *p.shape[1:]), params["layers"])
    return through(stage, params | {"layers": stages}, ids)


def experts(params: Any, ids: Any) -> Any:
    """Every layer has experts, which `vmap` runs; a router weighs them."""

    def mixture(h, w):
        scores = jax.nn.softmax(h @ w["router"])
        outs = jax.vmap(lambda a, b: jnp.tanh(h @ a) @ b)(w["a"], w["b"])
        return h + jnp.einsum("etsd,tse->tsd", outs, scores), None

    return through(mixture, params, ids)


@jax.custom_vjp
def kernel(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def _forward(x: Any, w: Any) -> Any:
    y = kernel(x, w)
    return y, (x, w, y)


def _backward(kept: Any, cotangent: Any) -> Any:
    x, w, y = kept
    pre = cotangent * (1 - y * y)
    return pre @ w.T, jnp.einsum("...i,...j->ij", x, pre)


kernel.defvjp(_forward, _backward)


def with_kernels(params: Any, ids: Any) -> Any:
    def block(h, w):
        return h + kernel(kernel(h, w["a"]), w["b"]), None

    return through(block, params, ids)


def in_list(params: Any, ids: Any) -> Any:
    h = params["table"][ids]
    for w in params["layers"]:
        h, _ = jax.checkpoint(layer)(h, w)
    return loss_of(h, params)


def tied(params: Any, ids: Any) -> Any:
    return loss_of(jnp.tanh(params["table"][ids]), params)


def looked_up(params: Any, ids: Any) -> Any:
    return jnp.mean(jnp.tanh(params["table"][ids]) ** 2)


def form(loss_fn: Any, change: Any = lambda params: params) -> Callable[[Sizes], Form]:
    return lambda sizes: (
        loss_fn,
        lambda: change({"table": table(sizes), "layers": matrices(sizes)}),
    )


def with_experts(sizes: Sizes) -> Form:
    def init():
        router = stack(sizes.layers, sizes.width, 2)
        return {"table": table(sizes), "layers": matrices(sizes, 2) | {"router": router}}

    return experts, init


def with_linen(axis: int, sizes: Sizes) -> Form:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h):
            return h + nn.Dense(sizes.width)(nn.tanh(nn.Dense(sizes.hidden)(h))), None

    axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
    layers = nn.scan(nn.remat(Block), length=sizes.layers, **axes)()

    def init():
        made = layers.init(jax.random.key(0), jnp.ones((1, sizes.width)))
        return {"table": table(sizes), "layers": made}

    def loss_fn(params, ids):
        return loss_of(layers.apply(params["layers"], params["table"][ids])[0], params)

    return loss_fn, init


def with_nnx(sizes: Sizes) -> Form:
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(sizes.width, sizes.hidden, rngs=rngs)
            self.down = nnx.Linear(sizes.hidden, sizes.width, rngs=rngs)

        def __call__(self, h):
            return h + self.down(nnx.tanh(self.up(h)))

    def make():
        keys = jax.random.split(jax.random.key(0), sizes.layers)
        return nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys)

    graph, _ = nnx.split(nnx.eval_shape(make))

    def loss_fn(params, ids):
        run = nnx.scan(lambda h, block: block(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return loss_of(run(params["table"][ids], nnx.merge(graph, params["layers"])), params)

    return loss_fn, lambda: {"table": table(sizes), "layers": nnx.split(make())[1]}


def with_equinox(sizes: Sizes) -> Form:
    def make():
        def block(key):
            return eqx.nn.MLP(sizes.width, sizes.width, sizes.hidden, depth=1, key=key)

        return eqx.filter_vmap(block)(jax.random.split(jax.random.key(0), sizes.layers))

    shapes = eqx.filter_eval_shape(make)
    static = eqx.filter(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct), inverse=True)

    def loss_fn(params, ids):
        def block(h, w):
            return h + jax.vmap(jax.vmap(eqx.combine(w, static)))(h), None

        return through(jax.checkpoint(block), params, ids)

    return loss_fn, lambda: {
        "table": table(sizes),
        "layers": eqx.filter(make(), eqx.is_inexact_array),
    }


def only_a_table(loss_fn: Any, sizes: Sizes) -> Form:
    """A table as large as the layers of the other forms."""
    rows = 2 * sizes.layers * sizes.hidden
    return loss_fn, lambda: {"table": table(sizes._replace(vocabulary=rows))}


def unstack(params: Any) -> Any:
    count = len(params["layers"]["a"])
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(count)]
    return params | {"layers": layers}


SCANNED: dict[str, Callable[[Sizes], Form]] = {
    "layers in checkpoints": form(scanned),
    "layers without": form(functools.partial(through, layer)),
    "the loss in a checkpoint": form(jax.checkpoint(scanned)),
    "the loss in jit": form(jax.jit(scanned)),
    "all in bfloat16": form(in_bfloat16),
    "stacked along axis 1": form(lambda params, ids: scanned(swap(params), ids), swap),
    "stages of layers": form(in_stages),
    "experts": with_experts,
    "kernels": form(with_kernels),
    "flax.linen": functools.partial(with_linen, 0),
    "flax.linen along axis 1": functools.partial(with_linen, 1),
    "equinox": with_equinox,
}
if hasattr(nnx, "as_pure"):  # the scan of Flax 0.12.0 writes into the state that it reads
    SCANNED["flax.nnx"] = with_nnx
OTHERS = {
    "layers in a list": form(in_list, unstack),
    "a tied table": functools.partial(only_a_table, tied),
    "a looked-up table": functools.partial(only_a_table, looked_up),
    "a looked-up table, weighted": functools.partial(only_a_table, looked_up),
}

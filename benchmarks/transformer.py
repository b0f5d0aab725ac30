"""A decoder-only transformer on a tree of plain arrays, and microbatches for it."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a model, and its loss as a function of parameters and a batch.

    Parameters are float32, as is usual in training. A batch is {"tokens": i32[rows, sequence + 1],
    "mask": f32[rows, sequence]}, where the mask is 1 if the token that follows counts.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    dtype: Any = jnp.float32  # that it computes in
    remat: bool = False  # whether blocks are computed again for the gradient
    tied: bool = True  # whether the head is the embedding of the tokens
    scanned: bool = False  # whether the blocks lie in one stack, with a scan over them
    # Axes of the mesh that divide the rows of activations. Under automatic sharding with divided
    # parameters XLA otherwise divides activations along other axes, and sends them.
    axes: tuple[str, ...] = ()

    def mean_loss(self, params: Any, batch: Any) -> jax.Array:
        """Returns the mean cross-entropy of the tokens that count, f32[]."""
        table, tokens = params["embedding"].astype(self.dtype), batch["tokens"]
        x = self.features(params, table, tokens[:, :-1])
        if self.tied:
            logits = jnp.einsum("btd,vd->btv", x, table)
        else:
            logits = x @ params["head"].astype(x.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return jnp.sum(losses * batch["mask"]) / jnp.maximum(self.tokens_of(params, batch), 1)

    def tokens_of(self, params: Any, batch: Any) -> jax.Array:
        return batch["mask"].sum()

    def features(self, params: Any, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Returns what it makes of each token, from their embeddings: [rows, sequence, width]."""
        x = self._rows(table[tokens])
        block = jax.checkpoint(self._block) if self.remat else self._block
        if self.scanned:
            x, _ = lax.scan(lambda x, one: (block(x, one), None), x, params["blocks"])
        else:
            for one in params["blocks"]:
                x = block(x, one)
        return self._norm(x, params["norm"])

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return jnp.einsum("btd,d->btd", wide.astype(x.dtype), scale.astype(x.dtype))

    def _block(self, x: jax.Array, params: Any) -> jax.Array:
        params = {name: p if "norm" in name else p.astype(x.dtype) for name, p in params.items()}
        h = self._norm(x, params["attention_norm"])
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", h, params[name]) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthe,bshe->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
        attended = jnp.einsum("bhts,bshe->bthe", weights, v)
        x = self._rows(x + jnp.einsum("bthe,hed->btd", attended, params["output"]))
        return self._rows(
            x + jax.nn.gelu(self._norm(x, params["mlp_norm"]) @ params["up"]) @ params["down"]
        )

    def _rows(self, x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, P(self.axes)) if self.axes else x


PRESETS = {
    "100k": Model(vocabulary=1024, width=64, layers=1, heads=2),
    "10m": Model(vocabulary=8192, width=320, layers=6, heads=5),
    "350m": Model(vocabulary=32768, width=1024, layers=24, heads=16, remat=True),
    **{
        name: Model(32768, width, layers, heads, jnp.bfloat16, remat=True, tied=False, scanned=True)
        for name, width, layers, heads in (("1b", 2048, 16, 16), ("7b", 4096, 32, 32))
    },
}


def param_shapes(model: Model) -> Any:
    width, heads = model.width, model.heads
    block = {
        **{name: (width, heads, width // heads) for name in ("query", "key", "value")},
        **{"output": (heads, width // heads, width), "attention_norm": (width,)},
        **{"up": (width, 4 * width), "down": (4 * width, width), "mlp_norm": (width,)},
    }
    stack = {name: (model.layers, *shape) for name, shape in block.items()}
    tree = {
        "embedding": (model.vocabulary, width),
        "blocks": stack if model.scanned else [block] * model.layers,
        "norm": (width,),
    }
    tree |= {} if model.tied else {"head": (width, model.vocabulary)}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def make_params(model: Model) -> Any:
    """Returns the parameters of the model, always the same ones, in the host's memory."""
    noise = np.random.default_rng(0)

    def make(path, leaf):
        if "norm" in str(path[-1]):
            return np.ones(leaf.shape, leaf.dtype)
        return noise.standard_normal(leaf.shape, leaf.dtype) * np.float32(model.width**-0.5)

    return jax.tree.map_with_path(make, param_shapes(model))


def make_window(
    model: Model, every_k: int, rows: int, sequence: int, ragged: bool = False
) -> list[Any]:
    """Returns microbatches on the host.

    If ragged, rows have very different numbers of tokens, and so have devices. All microbatches
    together have the same number, because `optax.MultiSteps` counts them alike.
    """
    noise = np.random.default_rng(1)
    lengths = np.linspace(sequence / 8 if ragged else sequence, sequence, rows).round().astype(int)
    return [
        {
            "tokens": noise.integers(model.vocabulary, size=(rows, sequence + 1), dtype=np.int32),
            "mask": (np.arange(sequence) < noise.permutation(lengths)[:, None]).astype(np.float32),
        }
        for _ in range(every_k)
    ]

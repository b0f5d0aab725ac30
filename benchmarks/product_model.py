"""A decoder-only transformer whose gradients can stay unreduced, and microbatches for it.

Under explicit sharding that is so for the gradient of a parameter that stands in a product. Here
all do: the tokens' table is multiplied by one-hot rows, the norms' scales in an `einsum`.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.transformer import Config

Tree = Any
PRESETS = {
    "80k": Config(vocabulary=256, width=64, layers=1, heads=2),
    "3m": Config(vocabulary=2048, width=192, layers=4, heads=3),
    "110m": Config(vocabulary=16384, width=768, layers=12, heads=12),
}


def make_params(config: Config) -> Tree:
    """Returns the parameters of the model, always the same ones, in the host's memory."""
    width, heads = config.width, config.heads
    shapes = {
        **{name: (width, heads, width // heads) for name in ("query", "key", "value")},
        **{"output": (heads, width // heads, width), "attention_norm": (width,)},
        **{"up": (width, 4 * width), "down": (4 * width, width), "mlp_norm": (width,)},
    }
    tree = {
        "embedding": (config.vocabulary, width),
        "blocks": [shapes] * config.layers,
        "norm": (width,),
        "head": (width, config.vocabulary),
    }
    noise = np.random.default_rng(0)

    def make(shape):
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return noise.normal(size=shape, scale=width**-0.5).astype(np.float32)

    return jax.tree.map(make, tree, is_leaf=lambda x: isinstance(x, tuple))


def sum_of_losses(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the cross-entropy of a decoder-only transformer, summed over the tokens that count.

    Args:
        params: of `make_params`.
        batch: "tokens" i32[rows, sequence + 1] and "mask" f32[rows, sequence], 1 where the token
            that follows counts.
    """

    def norm(x, scale):
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return jnp.einsum("btd,d->btd", x, scale)

    vocabulary = params["embedding"].shape[0]
    tokens = jax.nn.one_hot(batch["tokens"], vocabulary)
    x = tokens[:, :-1] @ params["embedding"]
    causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    for block in params["blocks"]:
        h = norm(x, block["attention_norm"])
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", h, block[name]) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        attended = jnp.einsum("bhts,bshe->bthe", weights, v)
        x = x + jnp.einsum("bthe,hed->btd", attended, block["output"])
        x = x + jax.nn.gelu(norm(x, block["mlp_norm"]) @ block["up"]) @ block["down"]
    logits = jax.nn.log_softmax(norm(x, params["norm"]) @ params["head"])
    return -jnp.sum(jnp.sum(logits * tokens[:, 1:], axis=-1) * batch["mask"])


def tokens_of(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns how many tokens of a batch count."""
    return batch["mask"].sum()


def mean_loss(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the mean cross-entropy of the tokens that count."""
    return sum_of_losses(params, batch) / jnp.maximum(tokens_of(params, batch), 1)


def make_window(config: Config, every_k: int, rows: int, sequence: int) -> list[dict[str, Any]]:
    """Returns microbatches on the host.

    Rows have very different numbers of tokens, and so have devices. All microbatches together have
    the same number, because `optax.MultiSteps` counts them alike.
    """
    noise = np.random.default_rng(1)
    lengths = np.linspace(sequence / 8, sequence, rows).round().astype(int)
    return [
        {
            "tokens": noise.integers(config.vocabulary, size=(rows, sequence + 1), dtype=np.int32),
            "mask": (np.arange(sequence) < noise.permutation(lengths)[:, None]).astype(np.float32),
        }
        for _ in range(every_k)
    ]

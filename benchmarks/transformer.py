"""A decoder-only transformer, the model that `benchmarks.train_step` trains."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model.

    Attributes:
        vocabulary: tokens that there are.
        width: features of a token.
        layers: blocks of attention and MLP, one after the other.
        heads: heads of the attention; they share the width.
        sequence: the most tokens of a sequence.
        remat: whether a block's activations are computed again for the gradient, not kept.
        dtype: what the model computes in. Its parameters are float32, as is usual in training.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    sequence: int = 1024
    remat: bool = False
    dtype: Any = jnp.float32


PRESETS = {
    "100k": Config(vocabulary=1024, width=64, layers=1, heads=2),
    "10m": Config(vocabulary=8192, width=320, layers=6, heads=5),
    "350m": Config(vocabulary=32768, width=1024, layers=24, heads=16, remat=True),
    "1b": Config(vocabulary=32768, width=2048, layers=18, heads=16, remat=True),
}


class Block(nnx.Module):
    """Causal self-attention and an MLP, each on the normalised residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, dtype, self.heads = config.width, config.dtype, config.heads
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.projection = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, sequence, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, sequence, 3, self.heads, -1), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.reshape(batch, sequence, width))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Embeddings, blocks, and a head that is tied to the embeddings of the tokens."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def embed(entries):
            init = nnx.initializers.normal(config.width**-0.5)
            return nnx.Embed(
                entries, config.width, dtype=config.dtype, embedding_init=init, rngs=rngs
            )

        self.remat = config.remat
        self.tokens = embed(config.vocabulary)
        self.positions = embed(config.sequence)
        self.blocks = nnx.List(Block(config, rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next tokens, f32[batch, sequence, vocabulary]."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        through = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x = through(block, x)
        return self.tokens.attend(self.norm(x)).astype(jnp.float32)


def mean_loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of every token but a sequence's first, f32[].

    Args:
        model: the model.
        tokens: i32[batch, sequence + 1].
    """
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def build(config: Config) -> tuple[Any, Any]:
    """Returns a model's graph and, in the host's memory, its parameters: always the same ones."""

    def split():
        return nnx.split(Transformer(config, nnx.Rngs(0)), nnx.Param)

    graph, _ = nnx.eval_shape(split)
    return graph, jax.device_get(jax.jit(lambda: split()[1])())

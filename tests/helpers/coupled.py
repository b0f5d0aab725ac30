"""Losses that look at all rows of a batch at once, and a model that has something for each."""

import jax
import jax.numpy as jnp
import numpy as np

ROWS, FEATURES, WIDTH, EXPERTS = 24, 6, 8, 4
EPS = float(np.finfo(np.float32).eps)
_KEYS = jax.random.split(jax.random.key(0), 8)


def _normal(i, *shape, dtype=jnp.float32):
    return jax.random.normal(_KEYS[i], shape, dtype)


BATCH = {
    "x": _normal(0, ROWS, FEATURES),
    "view": _normal(0, ROWS, FEATURES) + 0.3 * _normal(1, ROWS, FEATURES),
    "label": jax.random.randint(_KEYS[2], (ROWS,), 0, EXPERTS),
}


def make_params(dtype):
    """Returns parameters in a dtype; one leaf is None, and one, real, is in float32."""
    real = jnp.finfo(dtype).dtype
    return {
        "encoder": _normal(3, FEATURES, WIDTH, dtype=dtype) / 2,
        "bias": _normal(7, WIDTH, dtype=dtype) / 4,
        "router": _normal(4, FEATURES, EXPERTS, dtype=real) / 2,
        "temperature": jnp.float32(2.0),
        "absent": None,
    }


def encode(params, batch):
    """Returns two embeddings, router probabilities, logits, and one row of expert loads."""

    def embed(x):
        x = x.astype(params["router"].dtype)
        y = jnp.tanh(x @ params["encoder"] + params["bias"])
        return jnp.concatenate([y.real, y.imag], axis=1) if jnp.iscomplexobj(y) else y

    x = batch["x"].astype(params["router"].dtype)
    gate = jax.nn.softmax(x @ params["router"])
    return {
        "z": embed(batch["x"]),
        "view": embed(batch["view"]),
        "gate": gate,
        "logits": gate * params["temperature"].astype(gate.dtype),
        "expert": jnp.argmax(gate, axis=1),
        "loads": jax.nn.one_hot(jnp.argmax(gate, axis=1), EXPERTS).sum(axis=0)[None],
    }


def _unit(z):
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.sum(z**2, axis=1, keepdims=True) + 1e-6)


def _cross_entropy(logits, labels):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(picked)


def info_nce(out, batch, params):
    similarity = params["temperature"] * _unit(out["z"]) @ _unit(out["view"]).T
    labels = jnp.arange(len(similarity))
    return (_cross_entropy(similarity, labels) + _cross_entropy(similarity.T, labels)) / 2


def nt_xent(out, batch, params):
    z = _unit(jnp.concatenate([out["z"], out["view"]]))
    similarity = jnp.where(jnp.eye(len(z), dtype=bool), -1e9, params["temperature"] * z @ z.T)
    return _cross_entropy(similarity, (jnp.arange(len(z)) + len(z) // 2) % len(z))


def siglip(out, batch, params):
    similarity = params["temperature"] * _unit(out["z"]) @ _unit(out["view"]).T
    sign = 2 * jnp.eye(len(similarity)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(sign * similarity)) / len(similarity)


def experts(out, batch, params):
    """Cross-entropy, and the balance of experts over the whole batch, from its summed loads."""
    gate = out["gate"].astype(jnp.float32)
    loads = out["loads"].sum(axis=0) / len(gate)
    balance = EXPERTS * jnp.sum(loads * gate.mean(axis=0))
    return _cross_entropy(out["logits"].astype(jnp.float32), batch["label"]) + balance


def dice(out, batch, params):
    gate, target = out["gate"].astype(jnp.float32), jax.nn.one_hot(batch["label"], EXPERTS)
    return jnp.mean(1 - 2 * jnp.sum(gate * target, 0) / jnp.sum(gate**2 + target**2, 0))


def covariance(out, batch, params):
    """Barlow Twins."""

    def standard(z):
        z = z.astype(jnp.float32)
        return (z - z.mean(axis=0)) / (z.std(axis=0) + 1e-3)

    c = standard(out["z"]).T @ standard(out["view"]) / len(out["z"])
    eye = jnp.eye(len(c))
    return jnp.sum((1 - c) ** 2 * eye) + 0.1 * jnp.sum(c**2 * (1 - eye))


LOSSES = {f.__name__: f for f in (info_nce, nt_xent, siglip, experts, dice, covariance)}


def with_encoder(loss, encoder):
    """Returns the loss as a function of parameters and batch."""
    return lambda params, batch: loss(encoder(params, batch), batch, params)

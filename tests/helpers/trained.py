"""Training steps with states of many layouts, and with something beside the parameters that moves.

Each is `make_step(params, every_k)`, as `optaccum.testing.check_step` takes it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaccum

ROWS, WIDTH, K = 12, 5, 4
_keys = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": 0.5 * jax.random.normal(_keys[0], (WIDTH, 3)), "b": jnp.full(3, 0.1)}
BATCH = {
    "x": jax.random.normal(_keys[1], (ROWS, WIDTH)),
    "y": jax.random.normal(_keys[2], (ROWS, 3)),
    "reward": 1 + jax.random.normal(_keys[3], (ROWS,)),
}


def outputs(params, rows):
    return jnp.tanh(rows["x"] @ params["w"] + params["b"])


def mean_loss(params, rows):
    return jnp.mean((outputs(params, rows) - rows["y"]) ** 2)


class Trained(NamedTuple):
    weights: Any
    opt: Any


# How a state holds parameters and what the optimizer keeps, and how it gives them back.
LAYOUTS = {
    "params first": (lambda p, o: (p, o), lambda s: s),
    "params last": (lambda p, o: (o, p), lambda s: s[::-1]),
    "list": (lambda p, o: [o, p], lambda s: s[::-1]),
    "step first": (lambda p, o: (jnp.zeros([], jnp.int32), p, o), lambda s: s[1:]),
    "params": (lambda p, o: {"opt": o, "params": p}, lambda s: (s["params"], s["opt"])),
    "model": (lambda p, o: {"model": p, "optimizer": o}, lambda s: (s["model"], s["optimizer"])),
    "NamedTuple": (Trained, tuple),
    "nested": (lambda p, o: {"a": [o, {"b": p}]}, lambda s: (s["a"][1]["b"], s["a"][0])),
    "copy beside": (lambda p, o: (o, jax.tree.map(jnp.copy, p), p), lambda s: (s[2], s[0])),
}  # fmt: skip


def in_layout(name, make_tx):
    """Returns a loop whose state has a layout."""
    put, get = LAYOUTS[name]

    def make_step(params, every_k):
        tx = make_tx(every_k)

        @jax.jit
        def step(state, rows):
            params, opt_state = get(state)
            updates, opt_state = tx.update(jax.grad(mean_loss)(params, rows), opt_state, params)
            new = put(optax.apply_updates(params, updates), opt_state)
            return (*state[:1], *new[1:]) if name == "step first" else new

        return put(params, tx.init(params)), step

    return make_step


def beside(start, loss, change):
    """Returns a loop with something beside the parameters, which `change` moves in every call.

    `loss(params, extra, rows)` reads it, and `change(extra, params, rows)` returns the next.
    """

    def make_step(params, every_k):
        tx = optaccum.accumulate(every_k, optax.adam(0.05))

        @jax.jit
        def step(state, rows):
            params, opt_state, extra = state["params"], state["opt_state"], state["extra"]
            grads = jax.grad(loss)(params, extra, rows)
            new, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params)
            return {
                "params": new,
                "opt_state": opt_state,
                "extra": change(extra, params, rows),
            }

        extra = start(params) if callable(start) else start
        return {"params": params, "opt_state": tx.init(params), "extra": extra}, step

    return make_step


def _normalized(params, stats, rows):
    reward = (rows["reward"] - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-3)
    return -jnp.mean(jnp.exp(0.3 * outputs(params, rows)[:, 0]) * reward)


def _welford(stats, params, rows):
    count = stats["count"] + len(rows["reward"])
    off = rows["reward"].mean() - stats["mean"]
    mean = stats["mean"] + off * len(rows["reward"]) / count
    return {"mean": mean, "var": 0.8 * stats["var"] + 0.2 * rows["reward"].var(), "count": count}


def _biased(params, bias, rows):
    gates = jax.nn.softmax(outputs(params, rows) * 3)
    chosen = jax.nn.one_hot(jnp.argmax(gates + bias, -1), 3)
    return jnp.mean((jnp.sum(gates * chosen, -1) - rows["y"][:, 0]) ** 2)


def _rebias(bias, params, rows):  # aux-loss-free balance of experts
    gates = jax.nn.softmax(outputs(params, rows) * 3)
    load = jax.nn.one_hot(jnp.argmax(gates + bias, -1), 3).mean(0)
    return bias + 0.3 * jnp.sign(1 / 3 - load)


def _dino(params, extra, rows):
    target = jax.nn.softmax((outputs(extra["teacher"], rows) - extra["center"]) * 5)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(outputs(params, rows)), -1))


def _dino_next(extra, params, rows):
    return {
        "teacher": _toward(extra["teacher"], params),
        "center": 0.8 * extra["center"] + 0.2 * outputs(extra["teacher"], rows).mean(0),
    }


def _toward(average, params):
    return jax.tree.map(lambda e, p: 0.7 * e + 0.3 * p, average, params)


def _penalized(params, weight, rows):
    return mean_loss(params, rows) + weight * jnp.mean(outputs(params, rows) ** 2)


def _adapt(weight, params, rows):  # PPO's adaptive weight of the divergence
    return jnp.where(jnp.mean(outputs(params, rows) ** 2) > 0.3, weight * 1.5, weight / 1.5)


def _annealed(params, calls, rows):
    return mean_loss(params, rows) + 0.2 * calls * jnp.sum(params["w"] ** 2)


def _distilled(params, teacher, rows):
    return jnp.mean((outputs(params, rows) - outputs(teacher, rows) - 0.3 * rows["y"]) ** 2)


def copy(params):
    return jax.tree.map(jnp.copy, params)


def _follow(extra, params, rows):
    return _toward(extra, params)


def _count(extra, params, rows):
    return extra + 1


def _alone(params, extra, rows):
    return mean_loss(params, rows)


STATS, ZERO = {"mean": jnp.float32(0), "var": jnp.float32(1)}, jnp.zeros([], jnp.int32)
BESIDE = {
    "welford": ("state", beside(STATS | {"count": jnp.float32(1)}, _normalized, _welford)),
    "expert biases": ("state", beside(jnp.zeros(3), _biased, _rebias)),
    "center and teacher": (
        "state",
        beside(lambda p: {"teacher": copy(p), "center": jnp.zeros(3)}, _dino, _dino_next),
    ),
    "teacher": ("ema", beside(copy, _distilled, _follow)),
    "adaptive penalty": ("state", beside(jnp.float32(0.3), _penalized, _adapt)),
    "annealed by calls": ("state", beside(ZERO, _annealed, _count)),
    "average that nothing reads": ("ema", beside(copy, _alone, _follow)),
    "counter that nothing reads": (None, beside(ZERO, _alone, _count)),
}

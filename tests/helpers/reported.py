"""More losses that people report to accumulate wrongly, in the parts that a remedy asks for.

A loss is `of_rows(model(params, batch), batch)`, or a mean over rows of a batch that `prepare` has
changed. So a test can do what a report advises, and compare with the full batch.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

ROWS, LENGTH, WIDTH, CLASSES = 8, 5, 4, 3


def make_batch(seed):
    keys = jax.random.split(jax.random.key(seed), 8)
    mask = jax.random.uniform(keys[0], (ROWS, LENGTH)) > jnp.linspace(0.0, 0.7, ROWS)[:, None]
    return {
        "x": jax.random.normal(keys[1], (ROWS, LENGTH, WIDTH)),
        "y": jax.random.normal(keys[2], (ROWS, LENGTH, WIDTH)),
        "label": jax.random.randint(keys[3], (ROWS,), 0, CLASSES),
        "mask": mask.at[:, 0].set(True),
        "reward": jax.random.normal(keys[4], (ROWS,)),
        "time": jax.random.uniform(keys[5], (ROWS,)),
        "boxes": jax.random.randint(keys[6], (ROWS,), 1, 6),
        "behaviour": jax.random.uniform(keys[7], (ROWS,)) + 0.3,
    }


_keys = jax.random.split(jax.random.key(100), 3)
PARAMS = {
    "in": jax.random.normal(_keys[0], (WIDTH, 6)),
    "out": jax.random.normal(_keys[1], (6, CLASSES)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, the verdict on it and what helps.

    Attributes:
        fun: the loss.
        kind: of the verdict; None for exact.
        remedy: "microbatched", "hoisted", "statistics" (nothing helps), "factor", the expression
            of weights, or None.
        parts: `(model, of_rows)` for "microbatched", `(prepare, mean)` for "hoisted".
    """

    fun: Callable[..., Any]
    kind: str | None
    remedy: str | None
    parts: tuple[Any, Any] = (None, None)


CASES: dict[str, Case] = {}


def hidden(p, x):
    return jnp.tanh(x @ p["in"])


def tokens(p, b):
    return hidden(p, b["x"]) @ p["out"]


def pooled(p, b):
    return tokens(p, b).mean(1)


def views(p, b):
    return pooled(p, b), pooled(p, {**b, "x": b["y"]})


def each_loss(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(pooled(p, b), b["label"])


def token_losses(p, b):
    return jnp.sum((hidden(p, b["x"])[..., :WIDTH] - b["y"]) ** 2, -1)


def unit(z):
    return z / jnp.sqrt(jnp.sum(z**2, -1, keepdims=True) + 1e-6)


def coupled(model):
    """Adds a loss of all results of a model."""

    def add(of_rows):
        def loss(p, b):
            return of_rows(model(p, b), b)

        CASES[of_rows.__name__] = Case(loss, "coupled", "microbatched", (model, of_rows))
        return of_rows

    return add


def prepared(mean):
    """Adds a mean over rows that the data alone couple."""

    def add(prepare):
        def loss(p, b):
            return mean(p, prepare(b))

        CASES[prepare.__name__] = Case(loss, "coupled", "hoisted", (prepare, mean))
        return prepare

    return add


def case(kind, remedy):
    def add(fun):
        CASES[fun.__name__] = Case(fun, kind, remedy)
        return fun

    return add


# The statistics of rows are outside of the model.


@coupled(views)
def sigmoid_pairs(z, b):  # SigLIP
    similar = 5 * unit(z[0]) @ unit(z[1]).T - 1
    return -jax.nn.log_sigmoid(similar * (2 * jnp.eye(len(similar)) - 1)).sum() / len(similar)


@coupled(pooled)
def supervised_contrastive(z, b):
    similar = unit(z) @ unit(z).T / 0.5 - 1e9 * jnp.eye(len(z))
    same = (b["label"][:, None] == b["label"]) & ~jnp.eye(len(z), dtype=bool)
    each = jnp.sum(same * jax.nn.log_softmax(similar), 1) / jnp.maximum(same.sum(1), 1)
    return -each.mean()


@coupled(views)
def decorrelated(z, b):  # Barlow Twins, whose projector ends in BatchNorm
    one, two = ((x - x.mean(0)) / (x.std(0) + 1e-4) for x in z)
    c = one.T @ two / len(one)
    return jnp.sum((c - jnp.eye(len(c))) ** 2)


@coupled(views)
def variance_covariance(z, b):  # VICReg
    one, two = z
    spread = jax.nn.relu(1 - jnp.sqrt(one.var(0) + 1e-4)).mean()
    off = one - one.mean(0)
    cov = off.T @ off / (len(one) - 1)
    return jnp.mean((one - two) ** 2) + spread + jnp.sum((cov * (1 - jnp.eye(len(cov)))) ** 2)


@coupled(lambda p, b: pooled(p, b)[:, 0])
def cox(risk, b):
    at_risk = b["time"][None] >= b["time"][:, None]
    return -jnp.mean(risk - jax.nn.logsumexp(jnp.where(at_risk, risk[None], -1e9), axis=1))


@coupled(each_loss)
def hard_examples(losses, b):  # OHEM
    return jax.lax.top_k(losses, len(losses) // 2)[0].mean()


@coupled(token_losses)
def hard_tokens(losses, b):
    return jnp.sort(losses.ravel())[-losses.size // 4 :].mean()


@coupled(each_loss)
def conditional_value_at_risk(losses, b):
    limit = jax.lax.stop_gradient(jnp.quantile(losses, 0.5))
    return limit + jnp.maximum(losses - limit, 0).mean() / 0.5


@coupled(each_loss)
def trimmed_mean(losses, b):
    cut = max(len(losses) // 4, 1) if len(losses) > 2 else 0
    return jnp.sort(losses)[: len(losses) - cut].mean()


@coupled(each_loss)
def small_loss_half(losses, b):  # co-teaching
    kept = jax.lax.stop_gradient(losses) <= jnp.median(losses)
    return jnp.sum(losses * kept) / len(losses)


@coupled(each_loss)
def median_of_rows(losses, b):
    return jnp.median(losses)


@coupled(each_loss)
def exponentially_tilted(losses, b):  # TERM
    return jnp.log(jnp.mean(jnp.exp(2 * losses))) / 2


@coupled(each_loss)
def worst_group(losses, b):  # group DRO
    of = jax.nn.one_hot(b["label"], CLASSES)
    return jnp.max(of.T @ losses / jnp.maximum(of.sum(0), 1))


@coupled(lambda p, b: jax.nn.softmax(tokens(p, b)))
def entropy_of_the_mean(q, b):  # diversity of a codebook
    mean = q.reshape(-1, CLASSES).mean(0)
    return jnp.sum(mean * jnp.log(mean + 1e-7)) - jnp.mean(jnp.sum(q * jnp.log(q + 1e-7), -1))


@coupled(lambda p, b: (tokens(p, b), token_losses(p, b)))
def balanced_experts(out, b):
    gates = jax.nn.softmax(out[0])
    used = jax.nn.one_hot(gates.argmax(-1), CLASSES).mean((0, 1))
    return out[1].mean() + CLASSES * jnp.sum(used * gates.mean((0, 1)))


@coupled(lambda p, b: jax.nn.softmax(pooled(p, b)))
def soft_f1(q, b):
    y = jax.nn.one_hot(b["label"], CLASSES)
    return 1 - jnp.mean(2 * jnp.sum(q * y, 0) / (jnp.sum(q, 0) + jnp.sum(y, 0)))


@coupled(lambda p, b: pooled(p, b)[:, 0])
def concordance(s, b):
    t = b["reward"]
    cov = jnp.mean((s - s.mean()) * (t - t.mean()))
    return 1 - 2 * cov / (s.var() + t.var() + (s.mean() - t.mean()) ** 2)


@coupled(lambda p, b: pooled(p, b)[:, 0])
def ranked_pairs(s, b):  # RankNet
    pairs = b["reward"][:, None] > b["reward"]
    return jnp.sum(pairs * jax.nn.softplus(s[None] - s[:, None])) / jnp.sum(pairs)


@coupled(lambda p, b: pooled(p, b)[:, 0])
def listwise(s, b):  # ListNet, of a list that is the batch
    return -jnp.sum(jax.nn.softmax(b["reward"]) * jax.nn.log_softmax(s))


@coupled(views)
def aligned_covariances(z, b):  # CORAL
    one, two = (x - x.mean(0) for x in z)
    return jnp.sum((one.T @ one - two.T @ two) ** 2) / len(one) ** 2


@coupled(pooled)
def prototypes_assigned_in_turns(scores, b):  # SwAV
    q = jnp.exp(jax.lax.stop_gradient(scores))
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(scores), 1))


@jax.jit
def _whitened(z):
    off = z - z.mean(0)
    return jnp.linalg.solve(jnp.linalg.cholesky(off.T @ off / len(z) + jnp.eye(CLASSES)), off.T).T


@coupled(views)
def whitening(z, b):
    return jnp.mean((_whitened(z[0]) - _whitened(z[1])) ** 2)


# The data alone couple the rows.


def policy(p, b):
    return -jnp.mean(jnp.exp(0.1 * pooled(p, b)[:, 0]) * b["reward"])


@prepared(policy)
def whitened_rewards(b):
    return {**b, "reward": (b["reward"] - b["reward"].mean()) / (b["reward"].std() + 1e-8)}


@prepared(policy)
def ranked_rewards(b):
    return {**b, "reward": jnp.argsort(jnp.argsort(b["reward"])) / len(b["reward"])}


@prepared(lambda p, b: token_losses(p, b).mean())
def mixup(b):
    return {name: 0.6 * b[name] + 0.4 * jnp.roll(b[name], 1, axis=0) for name in ("x", "y")}


@prepared(lambda p, b: jnp.mean(b["scale"] * each_loss(p, b)))
def inverse_frequencies(b):
    of = jax.nn.one_hot(b["label"], CLASSES)
    return {**b, "scale": len(of) / jnp.maximum(of.sum(0), 1)[b["label"]]}


# The statistics of rows are inside the model.


def after(normalize):
    """Adds a loss of a model that has a layer behind what normalizes it."""

    def loss(p, b):
        z = jnp.tanh(normalize(b["x"] @ p["in"])) @ p["out"]
        return optax.softmax_cross_entropy_with_integer_labels(z.mean(1), b["label"]).mean()

    CASES[normalize.__name__] = Case(loss, "coupled", "statistics")
    return normalize


@after
def batch_norm(z):
    return (z - z.mean((0, 1))) / jnp.sqrt(z.var((0, 1)) + 1e-5)


@after
def centered_on_the_batch(z):
    return z - z.mean(0)


@after
def deviation_of_the_minibatch(z):  # StyleGAN
    return z + jnp.sqrt(z.var(0) + 1e-6).mean()


@after
def attention_between_rows(z):  # SAINT
    attended = jax.nn.softmax(jnp.einsum("btd,ctd->bc", z, z) / 30)
    return jnp.einsum("bc,ctd->btd", attended, z)


@after
def manifold_mixup(z):
    return 0.5 * z + 0.5 * z[::-1]


@case("coupled", "statistics")
def batch_norm_in_scanned_layers(p, b):
    def layer(x, w):
        z = x @ w
        return jnp.tanh((z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)), None

    x, _ = jax.lax.scan(layer, b["x"].mean(1), jnp.stack([p["in"][:, :4], p["in"][:, 2:]]))
    return jnp.mean(x**3)


@case("coupled", "statistics")
def experts_with_a_capacity(p, b):
    x = b["x"].reshape(-1, WIDTH)
    gates = jax.nn.softmax(x @ p["in"])
    of = jax.nn.one_hot(gates.argmax(-1), 6)
    kept = of * (jnp.cumsum(of, 0) <= len(x) // 8)
    z = jnp.tanh(jnp.einsum("te,t,td->td", kept * gates, jnp.ones(len(x)), x) @ p["in"]) @ p["out"]
    return jnp.mean(z**2)


# Counts.


@case("weights", "b['boxes'].sum()")
def divided_by_boxes(p, b):  # DETR
    return jnp.sum(each_loss(p, b) * b["boxes"]) / jnp.maximum(b["boxes"].sum(), 1)


@case("weights", "b['mask'].sum()")
def policy_over_tokens(p, b):  # GRPO and DAPO
    each = -jnp.exp(0.1 * token_losses(p, b)) * b["reward"][:, None]
    return jnp.sum(each * b["mask"]) / b["mask"].sum()


@case("weights", "b['behaviour'].sum()")
def self_normalized(p, b):  # importance sampling
    return jnp.sum(b["behaviour"] * each_loss(p, b)) / b["behaviour"].sum()


@case("weights", "(b['label'] == 1).sum()")
def normalized_by_positives(p, b):
    q = jax.nn.sigmoid(pooled(p, b)[:, 0])
    y = b["label"] == 1
    return -jnp.sum(jnp.where(y, jnp.log(q), 0)) / jnp.maximum(y.sum(), 1)


@case("factor", "factor")
def summed_tokens(p, b):
    return jnp.sum(token_losses(p, b))


@case("factor", "factor")
def unbiased(p, b):
    return jnp.sum(each_loss(p, b)) / (len(b["x"]) - 1)


# Right.


@case(None, None)
def group_relative_advantage(p, b):
    return policy(p, {**b, "reward": b["reward"] - 0.1})


@case(None, None)
def tokens_sorted_by_expert(p, b):  # dropless experts
    x = b["x"].reshape(-1, WIDTH)
    order = jnp.argsort(jnp.argmax(x @ p["in"], -1))
    z = jnp.tanh(x[order] @ p["in"])[jnp.argsort(order)]
    return jnp.mean(z**2)


@case(None, None)
def distillation(p, b):
    return optax.losses.kl_divergence(
        jax.nn.log_softmax(pooled(p, b)), jax.nn.softmax(b["y"].mean(1)[:, :CLASSES])
    ).mean()


@case(None, None)
def flow_matching(p, b):
    t = b["time"][:, None, None]
    z = hidden(p, t * b["x"] + (1 - t) * b["y"])[..., :WIDTH]
    return jnp.mean((z - (b["x"] - b["y"])) ** 2)

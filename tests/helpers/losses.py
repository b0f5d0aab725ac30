"""Losses that people accumulate, after public bugs and papers, with what is right for each.

A line that makes the loss what it is ends with `# here`.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

ROWS, LENGTH, WIDTH, CLASSES, N = 8, 6, 5, 7, 4
_keys = jax.random.split(jax.random.key(0), 12)
PARAMS = {
    "w": jax.random.normal(_keys[0], (WIDTH, CLASSES)),
    "b": 0.1 * jax.random.normal(_keys[1], (CLASSES,)),
    "embed": jax.random.normal(_keys[2], (11, WIDTH)),
}
_kept = jax.random.uniform(_keys[3], (ROWS, LENGTH)) > jnp.linspace(0.0, 0.8, ROWS)[:, None]
_labels = jax.random.randint(_keys[4], (ROWS, LENGTH), 0, CLASSES)
_tokens = jax.random.randint(_keys[5], (ROWS, LENGTH), 1, 11)
_lengths = jnp.array([6, 5, 3, 2, 6, 1, 4, 1])
BATCH = {
    "x": jax.random.normal(_keys[6], (ROWS, LENGTH, WIDTH)),
    "x2": jax.random.normal(_keys[7], (ROWS, LENGTH, WIDTH)),
    "labels": _labels,
    "ignored": jnp.where(_kept, _labels, -100),
    "mask": _kept.astype(jnp.float32),
    "tokens": jnp.where(jnp.arange(LENGTH) < _lengths[:, None], _tokens, 0),
    "lengths": _lengths,
    "sample": jax.random.uniform(_keys[8], (ROWS,)) + 0.2,
    "advantage": jax.random.normal(_keys[9], (ROWS,)),
    "time": jax.random.uniform(_keys[10], (ROWS,)),
    "target": jnp.where(_kept, jax.random.normal(_keys[11], (ROWS, LENGTH)), jnp.nan),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and what a check should say of it.

    Attributes:
        fun: the loss.
        kind: of the verdict by numbers; None for exact.
        source: what the right weights are, if they have a name.
        structure: of the first finding by structure alone, where that is not `kind`.
        options: keyword arguments of `check_loss`.
    """

    fun: Any
    kind: str | None
    source: str | None = None
    structure: str | None = None
    options: Any = dataclasses.field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The source lines that end with `# here`."""
        lines, first = inspect.getsourcelines(self.fun)
        found = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
        return [f"losses.py:{line}" for line in found]


CASES: dict[str, Case] = {}


def case(kind, source=None, structure=None, **options):
    def add(fun):
        CASES[fun.__name__] = Case(fun, kind, source, structure or kind, options)
        return fun

    return add


def logits(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def cross_entropy(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, b["x"]), b["labels"])


def outputs(p, b, name="x"):
    """One vector per row."""
    return logits(p, b[name]).mean(axis=1)


def scores(p, b):
    """One number per row."""
    return outputs(p, b) @ jnp.arange(1.0, CLASSES + 1) / CLASSES


def unit(z):
    return z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-6)


# Means over rows.


@case(None)
def mean_squared_error(p, b):
    return jnp.mean((logits(p, b["x"]) - 0.3) ** 2)


@case(None)
def labels_picked_by_position(p, b):
    x = jax.nn.log_softmax(outputs(p, b))
    return -x[jnp.arange(len(x)), b["labels"][:, 0]].mean()


@case(None)
def cross_entropy_of_all_tokens(p, b):
    return cross_entropy(p, b).mean()


@case(None)
def mean_of_each_sequence_first(p, b):
    each = (cross_entropy(p, b) * b["mask"]).sum(1) / jnp.maximum(b["mask"].sum(1), 1)
    return each.mean()


@case(None)
def weight_decay_in_the_loss(p, b):
    return cross_entropy(p, b).mean() + 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))


@case(None)
def layer_norm(p, b):
    z = b["x"] @ p["w"]
    z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return jnp.mean((z * p["b"] - 1) ** 4)


@case(None)
def group_norm_convolution(p, b):
    z = jax.lax.conv_general_dilated(
        b["x"], p["w"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    z = z[..., :6].reshape(len(z), LENGTH, 2, 3)
    z = (z - z.mean((1, 3), keepdims=True)) / jnp.sqrt(z.var((1, 3), keepdims=True) + 1e-5)
    return jnp.mean(jax.nn.relu(z) ** 3)


@case(None)
def remat_scan_attention(p, b):
    @jax.checkpoint
    def layer(x, scale):
        s = jnp.einsum("btd,bsd->bts", x, x)
        s = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), s, -1e9)
        return x + scale * jax.nn.softmax(s) @ x @ p["w"] @ p["w"].T, None

    x, _ = jax.lax.scan(layer, p["embed"][b["tokens"]], jnp.array([0.1, 0.2, 0.3]))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ p["w"], b["labels"]))


@case(None)
def vmap_of_one_example(p, b):
    def one(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y).sum()

    return jax.vmap(one)(b["x"], b["labels"]).mean()


@case(None)
def direct_preference(p, b):
    chosen, rejected = (cross_entropy(p, {**b, "x": b[name]}).sum(1) for name in ("x", "x2"))
    return -jax.nn.log_sigmoid(0.1 * (rejected - chosen)).mean()


@case(None)
def mixture_of_experts_top_one(p, b):
    gates = jax.nn.softmax(logits(p, b["x"]))
    best, which = jax.lax.top_k(gates, 1)
    return jnp.mean((best * p["embed"][which[..., 0]]).sum(-1) ** 2)


@case(None)
def connectionist_temporal(p, b):
    x = logits(p, b["x"])
    paddings = jnp.zeros(x.shape[:2])
    return optax.ctc_loss(x, paddings, b["labels"][:, :2], jnp.zeros((len(x), 2))).mean()


@case(None)
def two_views_in_one_batch(p, b):
    z = unit(logits(p, jnp.concatenate([b["x"], b["x2"]])).mean(1))
    one, two = z[: len(b["x"])], z[len(b["x"]) :]
    return -jnp.mean(jnp.sum(one * jax.lax.stop_gradient(two), -1))


@case(None)
def map_over_rows(p, b):
    return jnp.mean(jax.lax.map(lambda x: jnp.sum(logits(p, x) ** 2), b["x"]))


@jax.custom_vjp
def _clipped(x):
    return jnp.maximum(x, 0)


_clipped.defvjp(lambda x: (_clipped(x), x), lambda x, g: (g * (x > 0),))


@case(None)
def custom_derivative(p, b):
    return jnp.mean(_clipped(logits(p, b["x"])))


@case(None)
def clipped_policy(p, b):
    ratio = jnp.exp(0.1 * scores(p, b))
    clipped = jnp.clip(ratio, 0.9, 1.1)
    return -jnp.minimum(ratio * b["advantage"], clipped * b["advantage"]).mean()


@case(None)
def a_branch_that_rows_do_not_choose(p, b):
    z = jax.lax.cond(p["b"][0] > 0, jnp.tanh, jnp.sin, b["x"] @ p["w"])
    return jnp.mean(z**2)


@case(None, structure="divisor", weight_fn=lambda p, b: b["mask"].sum())
def tokens_counted_right(p, b):
    return jnp.sum(cross_entropy(p, b) * b["mask"]) / jnp.sum(b["mask"])  # here


@case(None)
def a_loop_of_fixed_length(p, b):
    z = jax.lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z @ p["w"] @ p["w"].T), b["x"])
    return jnp.mean(z**2)


@case(None)
def padding_is_all_counted(p, b):
    return jnp.mean(jnp.where(b["mask"] > 0, cross_entropy(p, b), 0))


# Means over what the data counts.


@case("weights", "b['mask'].sum()", "divisor")
def token_mean(p, b):  # transformers 34191
    return jnp.sum(cross_entropy(p, b) * b["mask"]) / jnp.maximum(b["mask"].sum(), 1)  # here


@case("weights", "(b['ignored'] != -100).sum()", "divisor")
def ignore_index(p, b):  # transformers 37766
    real = b["ignored"] != -100
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(p, b["x"]), jnp.where(real, b["ignored"], 0)
    )
    return jnp.where(real, each, 0).sum() / real.sum()  # here


@case("weights", "b['tokens'][:, 1:]", "divisor")
def shifted_padding(p, b):  # transformers 45305
    targets = b["tokens"][:, 1:]
    x = logits(p, p["embed"][b["tokens"][:, :-1]])
    each = optax.softmax_cross_entropy_with_integer_labels(x, targets % CLASSES)
    return each.mean(where=targets != 0)  # here


@case("weights", "b['lengths'].sum()", "divisor")
def lengths(p, b):
    real = jnp.arange(LENGTH) < b["lengths"][:, None]
    return jnp.sum(jnp.where(real, cross_entropy(p, b), 0)) / b["lengths"].sum()  # here


@case("weights", "b['sample'].sum()", "divisor")
def sample_weights(p, b):
    return jnp.average(cross_entropy(p, b).mean(1), weights=b["sample"])  # here


@jax.jit
def _masked_mean(each, mask):
    return (each * mask).sum() / mask.sum()  # in a jit of its own


@case("weights", "b['mask'].sum()", "divisor")
def token_mean_in_a_nested_jit(p, b):
    return _masked_mean(cross_entropy(p, b), b["mask"])


@case("weights", "b['target']", "divisor")
def missing_targets(p, b):
    real = ~jnp.isnan(b["target"])
    off = logits(p, b["x"])[..., 0] - jnp.where(real, b["target"], 0)
    return jnp.mean(off**2, where=real)  # here


@case("weights", None, "divisor")
def class_weights(p, b):
    weight = jnp.array([0.2, 1.0, 3.0, 0.5, 0.7, 2.0, 1.3])[b["labels"]]
    return (weight * cross_entropy(p, b)).sum() / weight.sum()  # here


@case("weights", "(b['labels'] == 1).sum()", "divisor")
def positives_only(p, b):
    positive = b["labels"] == 1
    total = jnp.where(positive, cross_entropy(p, b), 0).sum()
    return total / jnp.maximum(positive.sum(), 1)  # here


@case("weights", "(b['mask'] * b['sample']).sum()", "divisor")
def masked_and_weighted(p, b):
    weight = b["mask"] * b["sample"][:, None]
    return (weight * cross_entropy(p, b)).sum() / weight.sum()  # here


@case("weights", "b['mask'].sum()", "divisor")
def divided_before_it_is_summed(p, b):
    return jnp.sum(cross_entropy(p, b) * (b["mask"] / b["mask"].sum()))  # here


@case("weights", "b['mask'].sum()", "divisor")
def token_mean_times_rows(p, b):
    return len(b["x"]) * jnp.mean(cross_entropy(p, b), where=b["mask"] > 0)  # here


@case("weights", "b['mask'].sum()", "divisor", weight_fn=lambda p, b: b["sample"].sum())
def weighted_with_another_count(p, b):
    return jnp.sum(cross_entropy(p, b) * b["mask"]) / jnp.sum(b["mask"])  # here


@case("weights", "", None, weight_fn=lambda p, b: b["mask"].sum())
def weighted_without_a_count(p, b):
    return cross_entropy(p, b).mean()


@case("weights", "b['mask'].sum()", "divisor")
def divisor_in_a_scan(p, b):
    def chunk(total, each):
        return total + (each[0] * each[1]).sum(), None

    chunks = cross_entropy(p, b).T, b["mask"].T
    total, _ = jax.lax.scan(chunk, 0.0, chunks)
    return total / b["mask"].sum()  # here


@case(
    "weights", "b['mask'].sum()", "divisor", batch={**BATCH, "mask": BATCH["mask"].at[1::4].set(0)}
)
def no_token_at_all(p, b):
    return jnp.sum(cross_entropy(p, b) * b["mask"]) / b["mask"].sum()  # here


# Constant factors.


@case("factor")
def sum_over_rows(p, b):
    return cross_entropy(p, b).sum()


@case("factor", None, "factor")
def divided_by_rows_less_one(p, b):
    return cross_entropy(p, b).sum() / (len(b["x"]) - 1)  # here


@case("factor")
def divided_by_a_root(p, b):
    return cross_entropy(p, b).sum() / jnp.sqrt(len(b["x"]))


@case("factor")
def divided_by_a_fixed_batch_size(p, b):
    return cross_entropy(p, b).sum() / (ROWS * LENGTH)


@case("factor")
def divided_by_rows_twice(p, b):
    return cross_entropy(p, b).mean() / len(b["x"])


# Rows that depend on each other.


@case("coupled", None, "pairwise")
def image_and_text(p, b):  # torchtitan 4772
    similar = unit(outputs(p, b)) @ unit(outputs(p, b, "x2")).T  # here
    return optax.softmax_cross_entropy_with_integer_labels(similar, jnp.arange(len(b["x"]))).mean()


@case("coupled", None, "pairwise")
def two_views_all_pairs(p, b):
    z = unit(logits(p, jnp.concatenate([b["x"], b["x2"]])).mean(1))
    similar = z @ z.T - 1e9 * jnp.eye(len(z))  # here
    return optax.softmax_cross_entropy_with_integer_labels(
        similar, jnp.roll(jnp.arange(len(z)), len(z) // 2)
    ).mean()


@case("coupled", None, "batch_statistic")
def batch_norm(p, b):
    z = outputs(p, b)
    z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)  # here
    return jnp.mean((z * p["b"] - 0.3) ** 4)


@case("coupled", None, "nonlinear")
def root_mean_square(p, b):
    return jnp.sqrt(jnp.mean((logits(p, b["x"]) - 0.3) ** 2))  # here


@case("coupled", None, "order")
def partial_likelihood(p, b):
    risk = scores(p, b)[jnp.argsort(-b["time"])]  # here
    return -jnp.mean(risk - jax.lax.cumlogsumexp(risk))


@case("coupled", None, "nonlinear")
def cross_correlation(p, b):
    c = outputs(p, b).T @ outputs(p, b, "x2") / len(b["x"])
    return jnp.sum((c - jnp.eye(CLASSES)) ** 2)  # here


@case("coupled", None, "batch_statistic")
def variance_regularizer(p, b):
    spread = jnp.sqrt(outputs(p, b).var(0) + 1e-4)  # here
    return jnp.mean(jax.nn.relu(1 - spread)) + mean_squared_error(p, b)


@case("coupled", None, "nonlinear")
def dice(p, b):
    s = jax.nn.sigmoid(logits(p, b["x"])[..., 0])
    return 1 - 2 * jnp.sum(s * b["mask"]) / (jnp.sum(s) + jnp.sum(b["mask"]))  # here


@case("coupled", None, "nonlinear")
def load_balance(p, b):
    gates = jax.nn.softmax(logits(p, b["x"])).reshape(-1, CLASSES)
    used = jax.nn.one_hot(gates.argmax(-1), CLASSES).mean(0)
    return mean_squared_error(p, b) + CLASSES * jnp.sum(used * gates.mean(0))  # here


@case("coupled", None, "batch_statistic")
def normalized_advantage(p, b):
    a = b["advantage"]
    a = (a - a.mean()) / (a.std() + 1e-8)  # here
    return -jnp.mean(jnp.exp(0.1 * scores(p, b)) * a)


@case("coupled", None, "pairwise")
def hardest_triplet(p, b):
    z = outputs(p, b)
    far = jnp.sum((z[:, None] - z[None]) ** 2, -1)  # here
    same = b["labels"][:, 0, None] == b["labels"][:, 0]
    worst = jnp.max(jnp.where(same, far, 0), 1) - jnp.min(jnp.where(same, 1e3, far), 1)
    return jax.nn.relu(worst + 1.0).mean()


@case("coupled", None, "pairwise")
def mean_discrepancy(p, b):
    z, y = outputs(p, b), outputs(p, b, "x2")

    def kernel(a, c):
        return jnp.exp(-jnp.sum((a[:, None] - c[None]) ** 2, -1)).mean()  # here

    return kernel(z, z) + kernel(y, y) - 2 * kernel(z, y)


@case("coupled", None, "nonlinear")
def mutual_information(p, b):
    bound = jnp.exp(outputs(p, b, "x2")[:, 0]).mean()
    return jnp.log(bound) - scores(p, b).mean()  # here


@case("coupled", None, "nonlinear")
def worst_row(p, b):
    return jnp.max(cross_entropy(p, b).mean(1))  # here


@case("coupled", None, "order")
def hardest_examples(p, b):
    return jnp.mean(jax.lax.top_k(cross_entropy(p, b).mean(1), len(b["x"]) // 2)[0])  # here


@case("coupled", None, "order")
def mixed_with_the_reversed_batch(p, b):
    x = 0.7 * b["x"] + 0.3 * b["x"][::-1]  # here
    return jnp.mean((logits(p, x) - 0.3) ** 2)


@case("coupled", None, "batch_statistic")
def correlation(p, b):
    s, t = scores(p, b), b["time"]
    s, t = s - s.mean(), t - t.mean()  # here
    return -jnp.sum(s * t) / jnp.sqrt(jnp.sum(s**2) * jnp.sum(t**2))


@case("coupled", None, "batch_statistic")
def relativistic(p, b):
    other = outputs(p, b, "x2")[:, 0].mean()
    return jax.nn.softplus(-(scores(p, b) - other)).mean()  # here


@case("coupled", None, "order")
def value_at_risk(p, b):
    worst = jnp.sort(cross_entropy(p, b).mean(1))[-2:]  # here
    return worst.mean()


@case("coupled", None, "nonlinear")
def geometric_mean(p, b):
    return jnp.exp(jnp.log(cross_entropy(p, b).mean(1)).mean())  # here


@case("coupled", None, "nonlinear")
def log_of_all(p, b):
    return jax.nn.logsumexp(scores(p, b))  # here


# Terms that count differently.


@case("terms")
def tokens_and_rows(p, b):  # MaxText's auxiliary losses
    return token_mean(p, b) + 0.5 * jnp.mean(scores(p, b) ** 2)  # here


@case("terms")
def sum_and_weight_decay(p, b):
    return cross_entropy(p, b).sum() + 0.5 * jnp.sum(p["w"] ** 2)  # here


# Noise.


@case("stochastic")
def dropout_with_a_key_of_its_own(p, b):
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, b["x"].shape)  # here
    return jnp.mean(logits(p, b["x"] * keep) ** 2)


def mutate(case: Case, how: str) -> Case | None:
    """Returns a case with one more mistake, or None where it cannot be made or seen."""
    if case.kind == "stochastic" or case.fun is no_token_at_all:
        return None
    fun, options = case.fun, dict(case.options)
    if how == "weight":
        options["weight_fn"] = lambda p, b: 1 + b["sample"].sum() ** 2
        kind = {None: "weights", "factor": "weights"}.get(case.kind, case.kind)
    elif how == "factor":
        # Of a mean and of a sum alike, another power of the number of rows.
        @functools.wraps(fun)
        def changed(p, b):
            return fun(p, b) * len(b["x"]) ** 2

        kind = {None: "factor"}.get(case.kind, case.kind)
    else:

        @functools.wraps(fun)
        def changed(p, b):
            s = scores(p, b)
            return fun(p, b) + jnp.mean((s - s.mean()) ** 4) + jnp.std(s)

        kind = "coupled"
    return Case(fun if how == "weight" else changed, kind, None, None, options)

"""Objects among the arguments: what `fun` changes in them, and shapes that they keep."""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

X = jax.random.normal(jax.random.key(0), (8, 3))
every_n = pytest.mark.parametrize("n", [1, 2])
jit_or_not = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class Noisy(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(x)


def _mean(model, x):
    return jnp.mean(model(x) ** 2)


CALLS = {
    "value_and_grad": lambda n, model: optaccum.value_and_grad(_mean, num_microbatches=n)(model, X),
    "beside the parameters": lambda n, model: optaccum.grad(
        lambda w, x, model: w * _mean(model, x), num_microbatches=n
    )(2.0, X, model),
    "by keyword": lambda n, model: optaccum.grad(
        lambda w, x, *, models: w * _mean(models["a"], x), num_microbatches=n
    )(2.0, X, models={"a": model}),
    "microbatched": lambda n, model: optaccum.microbatched(
        lambda model, x: model(x), num_microbatches=n
    )(model, X),
    "gradients of microbatched": lambda n, model: jax.grad(
        lambda model: jnp.sum(
            optaccum.microbatched(lambda model, x: model(x), num_microbatches=n)(model, X) ** 2
        )
    )(model),
}


@pytest.mark.parametrize(("n", "jit"), [(1, lambda f: f), (2, jax.jit)], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CALLS)
def test_statistics_that_would_be_lost_are_refused(n, name, jit):
    def run(model):
        return CALLS[name](n, model)

    message = r"`fun` changed argument .*norm\.mean.* in place, .* type Normed, .*is lost; .* as an"
    with pytest.raises(TypeError, match=message) as error:
        jit(run)(Normed())
    assert ("`carry_argnum`" in str(error.value)) == ("microbatched" not in name)
    model = Normed()
    model.eval()
    jit(run)(model)
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(4))


@every_n
def test_counts_of_dropout_that_would_be_lost_are_refused(n):
    fun = optaccum.microbatched(lambda model, x: model(x), num_microbatches=n, rng_argnums=0)
    with pytest.raises(TypeError, match=r"`fun` changed argument 0\.dropout\.rngs\.count"):
        fun(Noisy(), X)
    model = Noisy()
    model.eval()
    np.testing.assert_array_equal(fun(model, X), X)

    def of_a_copy(model, x):
        return nnx.clone(model)(x)

    fun = optaccum.microbatched(of_a_copy, num_microbatches=n, rng_argnums=0)
    kept = fun(Noisy(), jnp.ones((8, 64))) != 0
    assert len(np.unique(kept, axis=0)) == 8


@every_n
@jit_or_not
def test_a_module_may_be_a_carry(n, jit):
    def fun(w, model, x):
        return w * _mean(model, x), (model, ())

    step = optaccum.value_and_grad(
        fun, has_aux=True, num_microbatches=n, batch_argnums=2, carry_argnum=1
    )
    (loss, (carry, _)), _ = jit(step)(2.0, Normed(), X)
    model, losses = Normed(), []
    for i in range(n):
        losses.append(2.0 * _mean(model, X[i::n]))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(carry.norm.mean[...], model.norm.mean[...], rtol=1e-5)
    assert np.any(carry.norm.mean[...])


@every_n
def test_what_is_returned_may_be_changed(n):
    def in_aux(model, x):
        return _mean(model, x), nnx.state(model, nnx.BatchStat)

    step = optaccum.value_and_grad(in_aux, has_aux=True, num_microbatches=n)
    (_, stats), _ = step(Normed(), X)
    for i in range(n):
        model = Normed()
        model(X[i::n])
        np.testing.assert_allclose(
            jax.tree.leaves(stats)[0][i],
            jax.tree.leaves(nnx.state(model, nnx.BatchStat))[0],
            rtol=1e-5,
        )

    def as_output(model, x):
        model = nnx.clone(model)
        return model(x), model.norm.mean[...][None]

    _, means = optaccum.microbatched(as_output, num_microbatches=n)(Normed(), X)
    assert means.shape == (n, 4)
    assert np.any(means)


@every_n
def test_any_object_that_fun_changes_is_refused(n):
    class Counter:
        def __init__(self, count):
            self.count = count

    jax.tree_util.register_pytree_node(
        Counter, lambda counter: ((counter.count,), None), lambda _, leaves: Counter(*leaves)
    )

    def fun(w, x, counters):
        counters[0].count += 1
        return jnp.mean(x @ w)

    counters = [Counter(0), {"other": 1.0}]
    with pytest.raises(TypeError, match=r"changed argument 2\[0\].* of type Counter"):
        optaccum.grad(fun, num_microbatches=n)(jnp.ones(3), X, counters)
    assert counters[0].count == 0


@every_n
def test_containers_may_change(n):
    """Many losses take the labels out of their batch."""

    def fun(w, batch, config):
        y = batch.pop("y")
        batch["x"] = batch["x"] / 2
        config["seen"].append(1.0)
        return jnp.mean((batch["x"] @ w - y) ** 2)

    def weight_fn(w, batch, config):
        return jnp.sum(batch["y"] > -9)

    batch, config = {"x": X, "y": X[:, 0]}, {"seen": []}
    step = optaccum.value_and_grad(fun, num_microbatches=n, weight_fn=weight_fn)
    loss, _ = step(jnp.ones(3), batch, config)
    np.testing.assert_allclose(loss, fun(jnp.ones(3), dict(batch), {"seen": []}), rtol=1e-6)
    assert batch.keys() == {"x", "y"}
    assert config == {"seen": []}


# Shapes in static metadata, as in haliax, whose NamedArrays have `axes` of a name and a size.


class Axis(NamedTuple):
    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class SizedAxis:
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Named:
    array: jax.Array
    axes: object

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, leaves):
        return cls(*leaves, axes)


@jax.tree_util.register_pytree_node_class
class Checked:
    def __init__(self, array, shape):
        if isinstance(array, jax.Array) and array.shape != shape:
            raise ValueError("array and shape differ")
        self.array, self.shape = array, shape

    def tree_flatten(self):
        return (self.array,), self.shape

    @classmethod
    def tree_unflatten(cls, shape, leaves):
        return cls(*leaves, shape)


NAMED = {
    "pairs": Named(X, (("row", 8), ("feature", 3))),
    "named tuples": Named(X, (Axis("row", 8), Axis("feature", 3))),
    "axes": Named(X, (SizedAxis("row", 8), SizedAxis("feature", 3))),
    "sizes": Named(X, [8, 3]),
    "dict": Named(X, {"row": 8, "feature": 3}),
    "checked": Checked(X, (8, 3)),
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
def test_a_shape_that_would_be_stale_is_refused(named):
    def fun(w, batch):
        return jnp.mean(batch["a"].array @ w)

    message = (
        r"argument 1\['a'\], an object of type (Named, keeps the shape of its array, \(8, 3\)|"
        r"Checked, cannot be rebuilt .*array and shape differ).*pass its arrays \(`x.array`"
    )
    for make in (optaccum.value_and_grad, optaccum.microbatched):
        with pytest.raises(ValueError, match=message):
            jax.jit(make(fun, num_microbatches=2))(jnp.ones(3), {"a": named})
    by_name = optaccum.grad(
        lambda w, x, *, a: jnp.mean(a.array @ w), num_microbatches=2, batch_argnames="a"
    )
    with pytest.raises(ValueError, match=r"argument `a`, an object of type"):
        by_name(jnp.ones(3), X, a=named)
    loss, _ = optaccum.value_and_grad(fun, num_microbatches=1)(jnp.ones(3), {"a": named})
    np.testing.assert_allclose(loss, X.sum(axis=1).mean(), rtol=1e-5)


def test_the_array_of_such_an_object_is_split():
    def fun(w, x):
        named = Named(x, (SizedAxis("row", len(x)), SizedAxis("feature", 3)))
        return jnp.mean(named.array @ w)

    _, grads = optaccum.value_and_grad(fun, num_microbatches=2)(jnp.ones(3), NAMED["axes"].array)
    np.testing.assert_allclose(grads, X.mean(axis=0), rtol=1e-5)


def test_an_output_that_would_be_stale_is_refused():
    def fun(w, x):
        return {"z": Named(x * w, (SizedAxis("row", len(x)), SizedAxis("feature", 3)))}

    encode = optaccum.microbatched(fun, num_microbatches=2)
    message = r"output \['z'\], an object of type Named, which keeps .*\(4, 3\).*return its arrays"
    with pytest.raises(ValueError, match=message):
        encode(2.0, X)
    plain = optaccum.microbatched(lambda w, x: fun(w, x)["z"].array, num_microbatches=2)
    np.testing.assert_array_equal(plain(2.0, X), 2 * X)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Labels:
    """Metadata that is as large as the batch by chance, and a shape that is no metadata."""

    ids: jax.Array
    classes: int = dataclasses.field(metadata={"static": True})
    names: tuple = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return self.ids.shape


def test_other_metadata_is_no_shape():
    labels = Labels(jnp.arange(8) % 8, 8, ("a",) * 8)

    def fun(w, batch):
        x, labels = batch
        assert labels.shape == (4,)
        return jnp.mean(x @ w * jax.nn.one_hot(labels.ids, labels.classes).sum(axis=1))

    _, grads = optaccum.value_and_grad(fun, num_microbatches=2)(jnp.ones(3), (X, labels))
    np.testing.assert_allclose(grads, X.mean(axis=0), rtol=1e-5)


@every_n
def test_an_object_that_makes_its_leaves_is_not_changed(n):
    class Halves:
        def __init__(self, double):
            self.double = double

    jax.tree_util.register_pytree_node(
        Halves,
        lambda x: ((x.double / 2,), None),
        lambda _, leaves: Halves(2 * leaves[0]),
    )
    grad = optaccum.grad(lambda w, x, h: jnp.mean(x @ w) * h.double, num_microbatches=n)
    found = grad(jnp.ones(3), X[:, :3], Halves(jnp.float32(4)))
    np.testing.assert_allclose(found, 4 * X[:, :3].mean(axis=0), rtol=1e-5)


def test_a_sparse_matrix_is_not_split_by_its_elements():
    rows = sparse.BCOO.fromdense(jnp.eye(8, 3) + jnp.eye(8, 3, k=-3))
    assert rows.nse % 2 == 0
    grad = optaccum.grad(lambda w, x: jnp.mean((x @ w) ** 2), num_microbatches=2)
    with pytest.raises(ValueError, match=r"argument 1, an object of type BCOO, .*\(8, 3\)"):
        grad(jnp.ones(3), rows)

"""Slips that programs make, each an error that names the remedy, where they were silent before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

PARAMS = {"w": jnp.ones(2)}
GRADS = {"w": jnp.full(2, 2.0)}


# Rows in an argument that `batch_argnums` does not name.


def _loss(w, x, y, scale=1.0):
    return jnp.mean((x @ w - y) ** 2) * jnp.mean(scale)


X = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
Y = jnp.array([0.0, 1.0, 5.0, -1.0])
W = jnp.array([1.0, -1.0])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_labels_beside_the_batch_are_not_broadcast(n):
    step = optaccum.value_and_grad(_loss, num_microbatches=n)
    message = r"argument 2 has 4 rows, as many as the batch in argument 1.*`batch_argnums=\(1, 2\)`"
    with pytest.raises(ValueError, match=message):
        jax.jit(step)(W, X, Y)
    with pytest.raises(ValueError, match=r"argument 2\['y'\] has 4 rows.*`batch_argnums=1` to"):
        optaccum.grad(lambda w, x, y: 0.0, num_microbatches=n)(W, X, {"scale": 2.0, "y": Y})
    both = optaccum.value_and_grad(_loss, num_microbatches=n, batch_argnums=(1, 2))
    loss, grads = both(W, X, Y)
    expected = jax.value_and_grad(_loss)(W, X, Y)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-6)


def test_as_many_rows_are_whole_if_somebody_says_so():
    whole = jnp.arange(4.0)
    expected, _ = jax.value_and_grad(_loss)(W, X, 0.0, whole)
    named = optaccum.value_and_grad(_loss, num_microbatches=2, batch_argnums=1)
    left_out = optaccum.value_and_grad(_loss, num_microbatches=2)
    by_name = optaccum.value_and_grad(_loss, num_microbatches=2, batch_argnames=())
    for loss, _ in (named(W, X, 0.0, whole), by_name(W, X, 0.0, scale=whole)):
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"argument 3 has 4 rows.*`batch_argnums=\(1, 3\)`"):
        left_out(W, X, 0.0, whole)


def test_what_has_another_role_may_have_as_many_rows():
    def fun(w, x, carry):
        return jnp.mean(x) * jnp.mean(w), (carry + 1, ())

    step = optaccum.value_and_grad(fun, has_aux=True, num_microbatches=2, carry_argnum=2)
    (_, (carry, _)), _ = step(jnp.ones(4), X, jnp.zeros(4))
    np.testing.assert_array_equal(carry, np.full(4, 2.0))


# Extra arguments that are almost ours: most of Optax takes any and says nothing.


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("weights", "weight"), ("wieght", "weight"), ("Weight", "weight"), ("realease", "release")],
)
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_mistyped_extra_argument(typed, meant, every_k):
    tx = optaccum.accumulate(every_k, optax.adam(0.1))
    message = rf"`{typed}` is no argument of `accumulate`; did you mean `{meant}`\?"
    for step in (tx.update, lambda *args, **kwargs: optaccum.apply_gradients(tx, *args, **kwargs)):
        with pytest.raises(TypeError, match=message):
            step(GRADS, tx.init(PARAMS), PARAMS, **{typed: 3.0})
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0, weight_decay=0.1)


def _reading(name):
    """Returns a transformation that names an extra argument, and scales with it."""
    program = (
        f"def update(g, state, params=None, *, {name}=None, **_): return times(g, {name}), state"
    )
    names = {"times": lambda g, x: jax.tree.map(lambda g: g * jax.tree.leaves(x)[0], g)}
    exec(program, names)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, names["update"])


def test_an_argument_that_inner_names_is_not_mistyped():
    for inner in (_reading("weights"), _reading("wieght")):
        (name,) = set(optaccum._spelling.named_by(inner.update)) & {"weights", "wieght"}
        tx = optaccum.accumulate(1, inner)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **{name: 3.0})
        np.testing.assert_array_equal(updates["w"], np.full(2, 6.0))
    tx = optaccum.accumulate(1, optax.sgd(1.0), average_args=("weights",))
    tx.update(GRADS, tx.init(PARAMS), PARAMS, weights=3.0)


def _train_state(tx, **fields):
    flax = pytest.importorskip("optaccum.flax")
    annotations = dict.fromkeys(fields, object)
    State = type("State", (flax.TrainState,), {"__annotations__": annotations})
    return State.create(apply_fn=None, params=PARAMS, tx=tx, **fields)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("every_k", [None, 1, 2])
def test_a_keyword_that_is_almost_a_field_is_refused(every_k, jit):
    tx = optax.adam(0.1) if every_k is None else optaccum.accumulate(every_k, optax.adam(0.1))
    state = _train_state(tx, key=jax.random.key(0))

    def step(state, **kwargs):
        return state.apply_gradients(grads=GRADS, **kwargs)

    step = jax.jit(step) if jit else step
    message = r"`keey` is no field of State and no argument of its `tx`, did you mean `key`\?"
    with pytest.raises(TypeError, match=message):
        step(state, keey=jax.random.key(1))
    with pytest.raises(TypeError, match="did you mean `apply_fn`"):
        state.apply_gradients(grads=GRADS, aply_fn=lambda: None)
    with pytest.raises(TypeError, match="did you mean `value`"):
        step(state, vlaue=1.0)
    state = step(state, key=jax.random.key(1), value=1.0)
    assert jax.random.key_data(state.key)[1] == 1


@pytest.mark.parametrize("every_k", [None, 1, 2])
@pytest.mark.parametrize("value", [3.0, {"a": jnp.float32(3), "b": jnp.ones(2)}], ids=type)
def test_extra_arguments_of_links_are_passed_on(every_k, value):
    """A link of a chain does not show in the signature."""
    inner = optax.chain(optax.clip(9.0), _reading("hyper"))
    tx = inner if every_k is None else optaccum.accumulate(every_k, inner)
    state = _train_state(tx)
    for _ in range(every_k or 1):
        state = state.apply_gradients(grads=GRADS, hyper=value)
    np.testing.assert_array_equal(state.params["w"], np.full(2, 1 + 6.0))


# The order of `optax.MultiSteps`.


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: optaccum.accumulate(opt, 4),
        lambda opt: optaccum.accumulate(opt),
        lambda opt: optaccum.accumulate(optax.MultiSteps(opt, 4), 4),
    ],
)
def test_the_order_of_multi_steps(call):
    message = r"`every_k` comes first and the optimizer second.*: accumulate\(every_k, optimizer\)"
    with pytest.raises(TypeError, match=message):
        call(optax.adam(1e-3))


def test_a_leaf_is_none_in_the_microbatch_that_releases():
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    params, one = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, jnp.ones(2)
    state = tx.init(params)
    for grads in ({"a": one, "b": None}, {"a": None, "b": one}):
        params, state = optaccum.apply_gradients(tx, grads, state, params)
    assert params["a"].tolist() == [0, 0]  # as docs/semantics.md says
    assert params["b"].tolist() == [-0.5, -0.5]

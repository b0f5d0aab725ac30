"""Bad input: what is wrong is named, with the remedy, and nothing accumulated is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, apply_gradients, has_released

PARAMS = {"layer": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
TX = accumulate(2, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("every_k", "error", "message"),
    [
        (np.int64(0), ValueError, r"`every_k` must be >= 1, got 0"),
        (jnp.int32(0), ValueError, r"`every_k` must be >= 1, got 0"),
        (2**31, ValueError, r"`every_k` must be <= 2147483647, got 2147483648"),
        (2.0, TypeError, r"`every_k` must be an integer.*got 2\.0 of type float"),
        (True, TypeError, r"`every_k` must be an integer.*got True of type bool"),
        (np.True_, TypeError, r"`every_k` must be an integer"),
        ("4", TypeError, r"`every_k` must be an integer.*got '4' of type str"),
        (None, TypeError, r"`every_k` must be an integer.*got None"),
        (np.array([4]), TypeError, r"`every_k` must be an integer"),
        (jnp.array([4]), TypeError, r"`every_k` must be a scalar \(integer\), got int32\[1\]"),
        (jnp.float32(4), TypeError, r"`every_k` must be a scalar \(integer\), got float32\[\]"),
    ],
)
def test_lengths_that_cannot_be_are_refused(every_k, error, message):
    with pytest.raises(error, match=message):
        accumulate(every_k, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (2.0, TypeError, r"`every_k\(gradient_step\)`.*scalar \(integer\), got 2\.0"),
        (jnp.float32(2), TypeError, r"got float32\[\]; cast a float schedule with"),
        (jnp.array([2]), TypeError, r"`every_k\(gradient_step\)`.*got int32\[1\]"),
        ("2", TypeError, r"`every_k\(gradient_step\)`.*got '2'"),
        (0, ValueError, r"`every_k` must be >= 1, got 0"),
    ],
)
def test_functions_that_return_no_length_are_refused(returned, error, message):
    tx = accumulate(lambda step: returned, optax.sgd(0.1))
    with pytest.raises(error, match=message):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("inner", [optax.adam, 0.1, "adam", (), optax.constant_schedule(0.1)])
def test_what_is_no_transformation_is_refused(inner):
    message = r"`inner` must be an optax.GradientTransformation.*got"
    with pytest.raises(TypeError, match=message) as error:
        accumulate(4, inner)
    assert ("call it to build" in str(error.value)) == callable(inner)


def test_apply_gradients_refuses_what_is_no_transformation():
    with pytest.raises(TypeError, match=r"`tx` must be an optax.GradientTransformation"):
        apply_gradients(optax.adam, GRADS, None, PARAMS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        ("float33", TypeError, r"`accumulator_dtype` 'float33' is not a dtype"),
        (jnp.int32, TypeError, r"`accumulator_dtype` must be floating-point or complex, got int32"),
        (bool, TypeError, r"`accumulator_dtype` must be floating-point or complex, got bool"),
        (jnp.float64, ValueError, r"`accumulator_dtype` float64 needs 64-bit types.*enable_x64"),
    ],
)
def test_dtypes_that_cannot_be_are_refused(dtype, error, message):
    with pytest.raises(error, match=message):
        accumulate(4, optax.sgd(0.1), accumulator_dtype=dtype)


@pytest.mark.parametrize(
    ("dtypes", "error", "message"),
    [
        ({"w": jnp.int32}, TypeError, r"`accumulator_dtype` of leaf \['w'\] must be floating"),
        ({"v": jnp.float32}, ValueError, r"must be a tree like the parameters, or a prefix of it"),
        (lambda path, p: int, TypeError, r"`accumulator_dtype` of leaf \['\w'\] must be floating"),
        (
            lambda path, p: (),
            TypeError,
            r"`accumulator_dtype` of leaf \['\w'\] \(\) is not a dtype",
        ),
    ],
)
def test_dtypes_that_fit_no_parameter_are_refused(dtypes, error, message):
    with pytest.raises(error, match=message):
        accumulate(4, optax.sgd(0.1), accumulator_dtype=dtypes).init({"w": 1.0, "b": 2.0})
    options = {"num_microbatches": 2, "accumulator_dtype": dtypes}
    with pytest.raises(error, match=message):
        optaccum.grad(lambda p, x: p["w"], **options)({"w": 1.0, "b": 2.0}, jnp.ones(2))


def test_one_dtype_is_asked_of_microbatched():
    with pytest.raises(TypeError, match=r"`accumulator_dtype` \{'w'.* is not a dtype"):
        optaccum.microbatched(len, num_microbatches=2, accumulator_dtype={"w": jnp.float32})


def test_a_real_accumulator_for_a_complex_leaf_is_refused():
    tx = accumulate(4, optax.sgd(0.1), accumulator_dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"float32 would drop the imaginary part.*complex64.*'z'"):
        tx.init({"a": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)})


def test_what_is_no_judge_is_refused():
    with pytest.raises(TypeError, match=r"`should_skip_update_fn` must be a function.*got True"):
        accumulate(4, optax.sgd(0.1), should_skip_update_fn=True)  # pyright: ignore
    tx = accumulate(4, optax.sgd(0.1), should_skip_update_fn=lambda grads, step, params: (step, ()))
    with pytest.raises(TypeError, match=r"`should_skip_update_fn` must be a scalar \(bool.*int32"):
        tx.init(PARAMS)
    tx = accumulate(4, optax.sgd(0.1), should_skip_update_fn=lambda *_: jnp.array(False))
    with pytest.raises(TypeError, match=r"`should_skip_update_fn` must return a pair"):
        tx.init(PARAMS)


def test_parameters_that_are_not_arrays_are_refused():
    with pytest.raises(TypeError, match=r"parameter leaf \['activation'\] is not an array but"):
        accumulate(4, optax.sgd(0.1)).init({"w": jnp.ones(2), "activation": jax.nn.relu})


def test_the_state_of_multi_steps_is_refused_with_the_remedy():
    tx, old = accumulate(4, optax.sgd(0.1)), optax.MultiSteps(optax.sgd(0.1), 4)
    with pytest.raises(TypeError, match=r"got MultiStepsState; .* optaccum\.from_multi_steps"):
        tx.update(PARAMS, old.init(PARAMS), PARAMS)


@pytest.mark.parametrize("every_k", [1, 4])
def test_a_state_that_is_not_ours_is_refused(every_k):
    tx = accumulate(every_k, optax.sgd(0.1))
    remedy = r"the order is \(grads, state, params\), in .*, and a checkpoint is restored into"
    with pytest.raises(TypeError, match=rf"must be the AccumulateState.*got dict; {remedy}"):
        tx.update(GRADS, PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"must be the AccumulateState.*got tuple"):
        apply_gradients(tx, GRADS, optax.adam(0.1).init(PARAMS), PARAMS)


def test_a_state_without_sums_says_how_it_gets_them():
    state = accumulate(1, optax.sgd(0.1)).init(PARAMS)
    tx = accumulate(4, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"made with `every_k=1`; give it one with `state._repl"):
        tx.update(GRADS, state, PARAMS)
    tx.update(GRADS, state._replace(grad_sum=tx.init(PARAMS).grad_sum), PARAMS)


def test_a_state_of_another_inner_is_named_beside_its_error():
    state = accumulate(2, optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(AttributeError, match="mu") as found:
        jax.jit(accumulate(2, optax.adam(0.1)).update)(GRADS, state, PARAMS)
    assert "`inner_state` was made by another `inner`" in found.value.__notes__[0]


def test_an_inner_state_that_changes_its_structure_is_refused():
    inner = optax.GradientTransformation(lambda _: None, lambda g, state, params=None: (g, 1.0))
    tx = accumulate(1, inner)
    with pytest.raises(ValueError, match=r"`inner` returned a state of the tree structure"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_kinds_are_checked_where_there_is_nothing_to_compare_with():
    tx = accumulate(1, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"gradient leaf .* has dtype int32"):
        tx.update(jax.tree.map(lambda x: x.astype(int), GRADS), tx.init(PARAMS))


def _set(path, value):
    grads = {"layer": dict(GRADS["layer"])}
    if value is None:
        del grads["layer"][path]
    else:
        grads["layer"][path] = value
    return grads


BAD_GRADIENTS = [
    (_set("w", jnp.ones((3, 1))), ValueError, r"\['layer'\]\['w'\] has shape \(3, 1\).*\(3, 2\)"),
    (_set("b", jnp.ones((1, 2))), ValueError, r"\['layer'\]\['b'\] has shape \(1, 2\)"),
    (_set("w", jnp.ones((3, 2), int)), TypeError, r"\['layer'\]\['w'\] has dtype int32"),
    (_set("w", jnp.ones((3, 2), bool)), TypeError, r"\['layer'\]\['w'\] has dtype bool"),
    (_set("w", np.zeros((3, 2), jax.dtypes.float0)), TypeError, r"\['w'\] has dtype float0"),
    (_set("w", jnp.ones((3, 2), jnp.complex64)), ValueError, r"\['w'\] is complex64.*float32"),
    (_set("b", None), ValueError, r"have no leaf \['layer'\]\['b'\]"),
    (_set("extra", jnp.ones(2)), ValueError, r"\['layer'\]\['extra'\] has no counterpart"),
    (_set("w", {"u": jnp.ones(2)}), ValueError, r"\['layer'\]\['w'\]\['u'\] has no counterpart"),
    ({"layer": jnp.ones(2)}, ValueError, r"\['layer'\] has no counterpart"),
    (list(jax.tree.leaves(GRADS)), ValueError, r"\[0\] has no counterpart"),
]


@pytest.mark.parametrize("every_k", [1, 4])
@pytest.mark.parametrize(("grads", "error", "message"), BAD_GRADIENTS)
@pytest.mark.parametrize("fused", [False, True], ids=["update", "apply_gradients"])
def test_gradients_that_do_not_fit_are_refused(every_k, grads, error, message, fused):
    tx = accumulate(every_k, optax.sgd(0.1))
    step = functools.partial(apply_gradients, tx) if fused else tx.update
    with pytest.raises(error, match=message):
        jax.jit(step)(grads, tx.init(PARAMS), PARAMS)


def test_a_gradient_that_is_not_an_array_is_refused():
    tx = accumulate(4, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"gradient leaf \['layer'\]\['w'\] is not an array but"):
        tx.update(_set("w", "gradient"), tx.init(PARAMS), PARAMS)


def test_another_container_of_the_same_leaves_is_refused():
    tx = accumulate(4, optax.sgd(0.1))
    state = tx.init((jnp.ones(2), jnp.ones(3)))
    with pytest.raises(
        ValueError, match=r"tree structure.*\[\*, \*\].*initialised with.*\(\*, \*\)"
    ):
        tx.update([jnp.ones(2), jnp.ones(3)], state)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"weight": jnp.ones(1)}, TypeError, r"`weight` must be a scalar.*got float32\[1\]"),
        ({"weight": np.ones((2, 2))}, TypeError, r"`weight` must be a scalar"),
        ({"weight": "3"}, TypeError, r"`weight` must be a scalar.*got '3'"),
        ({"weight": 1j}, TypeError, r"`weight` must be a scalar"),
        ({"weight": [1.0]}, TypeError, r"`weight` must be a scalar"),
        ({"release": 1}, TypeError, r"`release` must be a scalar \(bool.*got 1 of type int"),
        ({"release": jnp.ones(2, bool)}, TypeError, r"`release` must be a scalar.*got bool\[2\]"),
        ({"release": "yes"}, TypeError, r"`release` must be a scalar"),
    ],
)
@pytest.mark.parametrize("every_k", [1, 4])
def test_weights_and_releases_that_cannot_be_are_refused(every_k, extra, error, message):
    tx = accumulate(every_k, optax.sgd(0.1))
    with pytest.raises(error, match=message):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)


@pytest.mark.parametrize("release", [False, jnp.array(False), jnp.array(True)])
def test_release_without_an_accumulator_is_refused(release):
    tx = accumulate(1, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`release` must be None or True with `every_k` 1"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, release=release)


def test_averaged_arguments_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match=r"`average_args` must be a tuple of names.*'value'"):
        accumulate(4, optax.sgd(0.1), average_args="value")  # pyright: ignore
    with pytest.raises(TypeError, match=r"`average_args` must be a tuple of names.*None"):
        accumulate(4, optax.sgd(0.1), average_args=None)  # pyright: ignore
    with pytest.raises(ValueError, match=r"`average_args` cannot name 'weight'"):
        accumulate(4, optax.sgd(0.1), average_args=("weight",))
    tx = accumulate(4, optax.sgd(0.1), average_args=("value",))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"`average_args` names 'value'.*pass `value=`"):
        tx.update(GRADS, state, PARAMS)
    for value in (jnp.ones(3), "high", 1j, None):
        with pytest.raises(TypeError, match=r"`value` \(one of `average_args`\) must be a scalar"):
            tx.update(GRADS, state, PARAMS, value=value)


@pytest.mark.parametrize("tx", [TX, accumulate(1, optax.sgd(0.1)), optax.sgd(0.1)])
def test_apply_gradients_needs_the_parameters(tx):
    with pytest.raises(TypeError, match="needs the parameters, got None"):
        apply_gradients(tx, jnp.ones(3), tx.init(jnp.ones(3)), None)


def test_missing_parameters_are_refused_by_optax():
    tx = accumulate(4, optax.adamw(0.1))
    with pytest.raises(ValueError, match="you are not passing `params`"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize(("bad", "error", "_"), BAD_GRADIENTS)
def test_nothing_accumulated_is_lost_by_an_error(bad, error, _):
    tx = accumulate(2, optax.sgd(1.0))
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=(1, 2))
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state = step(GRADS, tx.init(params), params)
    with pytest.raises(error):
        step(bad, state, params)
    params, state = step(GRADS, state, params)
    assert has_released(state)
    np.testing.assert_array_equal(params["layer"]["b"], -np.ones(2))


def test_an_inner_state_that_changes_its_shape_is_refused():
    def update(updates, state, params=None):
        return updates, jnp.ones(3)

    tx = accumulate(1, optax.GradientTransformation(lambda params: jnp.ones(2), update))
    message = r"`inner` returned a state whose leaf \(the only leaf\) has the shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_parameters_of_another_shape_are_refused():
    tx = accumulate(2, optax.sgd(0.1))
    params = {"layer": {"w": jnp.ones((3, 1)), "b": jnp.zeros(2)}}
    message = r"parameter leaf \['layer'\]\['w'\] has shape \(3, 1\), but .* shape \(3, 2\)"
    for step in (apply_gradients, lambda tx, *args: tx.update(*args)):
        with pytest.raises(ValueError, match=message):
            step(tx, GRADS, tx.init(PARAMS), params)


@pytest.mark.parametrize("params", [{}, {"layer": PARAMS["layer"]["w"]}, [1.0]])
def test_parameters_of_another_structure_are_refused(params):
    tx = accumulate(2, optax.sgd(0.1))
    message = r"`params` have the tree structure .*; pass the parameters that `init` was given"
    with pytest.raises(ValueError, match=message):
        apply_gradients(tx, GRADS, tx.init(PARAMS), params)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), params)  # as in Optax: sgd does not read them
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("every_k", [1, 2])
def test_no_gradients_are_refused(every_k):
    tx = accumulate(every_k, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"the gradients are None; pass a tree like the parameters"):
        tx.update(None, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("value", ["False", None, 0, jnp.array(True)])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(TypeError, match=r"`use_grad_mean` must be True or False, got"):
        accumulate(2, optax.sgd(0.1), use_grad_mean=value)


@pytest.mark.parametrize("name", ["updates", "grads", "state", "params", "weight", "release"])
def test_names_that_update_has_itself_are_refused(name):
    with pytest.raises(ValueError, match=rf"`metrics` cannot name '{name}'"):
        accumulate(2, optax.sgd(0.1), metrics=(name,))


def test_an_axis_has_a_name():
    with pytest.raises(ValueError, match=r"`reduce_axes` must be names of mesh axes, or \(\)"):
        accumulate(2, optax.sgd(0.1), reduce_axes="")


def test_the_name_of_a_dtype_is_no_parameter():
    with pytest.raises(
        TypeError, match=r"parameter leaf \['dtype'\] is not an array but 'float32'"
    ):
        accumulate(2, optax.sgd(0.1)).init({"w": jnp.ones(2), "dtype": "float32"})


def test_a_state_that_was_made_without_a_judge_says_how_it_gets_one():
    old, new = (
        accumulate(2, optax.sgd(0.1), should_skip_update_fn=judge)
        for judge in (None, optax.skip_not_finite)
    )
    _, state = old.update(GRADS, old.init(PARAMS), PARAMS)
    with pytest.raises(
        ValueError, match=r"keeps one of .* go on with `state._replace\(skip_state="
    ):
        new.update(GRADS, state, PARAMS)
    state = state._replace(skip_state=new.init(PARAMS).skip_state)
    _, state = new.update(GRADS, state, PARAMS)
    assert has_released(state)


def _stateful(first, new):
    return optax.GradientTransformation(
        lambda params: {"a": first}, lambda g, state, params=None: (g, {"a": new(state["a"])})
    )


@pytest.mark.parametrize("every_k", [1, 2])
@pytest.mark.parametrize(
    ("first", "new", "was", "is_"),
    [
        (0, lambda x: x + 0.26, "int32", "float32"),
        (jnp.float32(0), lambda x: x + 1j, "float32", "complex64"),
        (jnp.bool_(True), lambda x: x + 1, "bool", "int32"),
    ],
)
def test_an_inner_state_that_changes_its_kind_is_refused(every_k, first, new, was, is_):
    tx = accumulate(every_k, _stateful(first, new))
    message = rf"`inner` returned a state whose leaf \['a'\] is {is_}, but began as {was}"
    for update in (tx.update, jax.jit(tx.update)):
        state = tx.init(PARAMS)
        with pytest.raises(TypeError, match=message):
            update(GRADS, state, PARAMS)


# The order of `optax.MultiSteps`.


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: optaccum.accumulate(opt, 4),
        lambda opt: optaccum.accumulate(opt),
        lambda opt: optaccum.accumulate(optax.MultiSteps(opt, 4), 4),
    ],
)
def test_the_order_of_multi_steps_is_refused(call):
    message = r"`every_k` comes first and the optimizer second.*: accumulate\(every_k, optimizer\)"
    with pytest.raises(TypeError, match=message):
        call(optax.adam(1e-3))


def _pair(params, x):
    return jnp.mean(params * x), x


@pytest.mark.parametrize(
    "step",
    [
        optaccum.value_and_grad(_pair, num_microbatches=2),
        optaccum.grad(_pair, num_microbatches=2),
        optaccum.microbatched_loss(_pair, num_microbatches=2),
        lambda params, x: optaccum.value_and_apply(TX, _pair)(params, TX.init(params), x),
    ],
)
def test_a_loss_that_returns_more_is_told_of_has_aux(step):
    with pytest.raises(TypeError, match="a scalar, got a tuple of 2; pass `has_aux=True`"):
        step(jnp.ones([]), jnp.ones(4))


def test_a_weight_fn_of_the_batch_alone_is_told_of_the_parameters():
    loss_fn, params, x = lambda p, x: jnp.mean(p * x), jnp.ones([]), jnp.ones(4)
    message = r"`weight_fn` is called with the arguments of `fun`, the parameters first"
    with pytest.raises(TypeError, match=message):
        optaccum.value_and_grad(loss_fn, num_microbatches=2, weight_fn=len)(params, x)
    with pytest.raises(TypeError, match=message):
        optaccum.value_and_apply(TX, loss_fn, weight_fn=len)(params, TX.init(params), x)


def test_a_loss_that_closes_over_its_batch_is_refused():
    step = optaccum.value_and_grad(lambda params: jnp.mean(params), num_microbatches=2)
    with pytest.raises(
        ValueError, match="if `fun` closes over its batch, make the batch an argument"
    ):
        step(jnp.ones(4))


def test_a_batch_behind_another_argument_is_named():
    step = optaccum.value_and_grad(lambda params, f, x: f(params * x), num_microbatches=2)
    with pytest.raises(ValueError, match=r"argument 1 .* and name the batch in `batch_argnums`"):
        step(jnp.ones([]), jnp.mean, jnp.ones(4))

"""The gradient noise scale: against plain NumPy and the truth, and what must not disturb it."""

import functools

from flax import nnx
from helpers import meshes
from helpers.hlo import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest
import reference
from reference import Microbatch

from optaccum import (
    accumulate,
    apply_gradients,
    init_noise_scale,
    state_shardings,
    update_noise_scale,
    window_metrics,
)
import optaccum.flax

PARAMS = [jnp.zeros(4), jnp.zeros((2, 3))]
NOTHING = (0, 0, np.inf)  # before the first estimate
NAN = [np.full(p.shape, np.nan, np.float32) for p in PARAMS]
TX = accumulate(9, optax.sgd(0.1))  # windows close by `release`, so that one program serves many


def draw(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return [(1 + rng.normal(size=p.shape)).astype(p.dtype) for p in like]


def window(seed, *weights, like=PARAMS):
    return [Microbatch(draw(100 * seed + i, like), w) for i, w in enumerate(weights)]


WINDOWS = [
    window(i, *weights)
    for i, weights in enumerate([(1, 2, 3, 4), (3, 0.5, 0, 7), (5, 5), (0, 2, 9), (1, 1, 1, 1)])
]


def results(noise):
    return np.array([noise.trace, noise.signal, noise.batch_size])


def step(tx, params, state, noise, grads, weight, release=None, **options):
    params, state = apply_gradients(tx, grads, state, params, weight=weight, release=release)
    noise = update_noise_scale(noise, grads, state, weight=weight, **options)
    return params, state, noise


@functools.cache
def jitted(tx, **options):
    return jax.jit(functools.partial(step, tx, **options))


def run(windows, tx=TX, carry=None, params=PARAMS, step_fn=None, **options):
    """Returns (params, state, noise) after windows, of which the last microbatch releases each."""
    carry = carry or (params, tx.init(params), init_noise_scale())
    step_fn = step_fn or jitted(tx, **options)
    for microbatches in windows:
        for i, m in enumerate(microbatches):
            release = jnp.asarray(i + 1 == len(microbatches))
            carry = step_fn(*carry, m.gradient, jnp.float32(m.weight), release)
    return carry


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_grad_mean": False}, {"loss_reduction": "sum"}],
    ids=["mean", "sum for inner", "gradients of sums"],
)
def test_as_plain_numpy_after_every_window(decay, options):
    tx, carry = accumulate(9, optax.adam(0.1), **options), None
    reduction = {name: x for name, x in options.items() if name == "loss_reduction"}
    for n, microbatches in enumerate(WINDOWS, 1):
        if reduction:
            scaled = [[np.float32(m.weight) * g for g in m.gradient] for m in microbatches]
            given = [Microbatch(g, m.weight) for g, m in zip(scaled, microbatches, strict=True)]
        else:
            given = microbatches
        carry = run([given], tx, carry, decay=decay, **reduction)
        expected = reference.noise_scale(WINDOWS[:n], decay)
        np.testing.assert_allclose(results(carry[2]), expected, rtol=1e-5)


def test_as_plain_numpy_without_weights():
    microbatches, carry = window(0, *[1.0] * 9), (PARAMS, TX.init(PARAMS), init_noise_scale())
    for m in microbatches:
        carry = jitted(TX)(*carry, m.gradient, None)
    expected = reference.noise_scale([microbatches])
    np.testing.assert_allclose(results(carry[2]), expected, rtol=1e-5)


def test_the_estimates_have_no_bias():
    """Over 20,000 windows of unequal weights both moments are right to their standard errors.

    Each window is a member of a `jax.vmap`, with a state of its own.
    """
    count, size, signal, variance = 20_000, 6, 0.7, 1.3
    weights = jnp.array([1.0, 3.0, 0.5, 8.0])
    tx, params = accumulate(4), jnp.zeros(size)

    def microbatch(carry, given):
        weight, key = given
        grads = signal + jax.random.normal(key, (size,)) * jnp.sqrt(variance / weight)
        return step(tx, *carry, grads, weight), None

    def member(key):
        carry = params, tx.init(params), init_noise_scale()
        return jax.lax.scan(microbatch, carry, (weights, jax.random.split(key, 4)))[0][2]

    found = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(1), count))
    for estimates, truth in ((found.trace, size * variance), (found.signal, size * signal**2)):
        estimates = np.asarray(estimates, np.float64)
        error = estimates.std() / np.sqrt(count)
        assert abs(estimates.mean() - truth) < 4 * error
        assert error < 0.02 * truth


def test_as_plain_numpy_for_complex_narrow_and_integer_leaves():
    params = [jnp.zeros((2, 3), jnp.complex64), jnp.zeros(4, jnp.bfloat16), jnp.arange(3)]
    rng = np.random.default_rng(0)

    def gradient():
        w = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
        return [w.astype(np.complex64), np.asarray(rng.normal(size=4), jnp.bfloat16), None]

    windows = [[Microbatch(gradient(), 2.0) for _ in range(3)]]
    found = results(run(windows, params=params)[2])
    np.testing.assert_allclose(found, reference.noise_scale(windows), rtol=1e-5)


def test_as_plain_numpy_in_double_precision(x64):
    params = [jnp.zeros(4, jnp.float32), jnp.zeros((2, 3))]
    windows = [window(i, 1, 2, like=params) for i in range(2)]
    noise = run(windows, accumulate(9), params=params)[2]
    np.testing.assert_allclose(results(noise), reference.noise_scale(windows), rtol=1e-5)
    fresh = init_noise_scale()
    assert jax.tree.map(jax.typeof, noise) == jax.tree.map(jax.typeof, fresh)


def test_nothing_is_known_before_a_window_of_two():
    carry = run([])
    np.testing.assert_array_equal(results(carry[2]), NOTHING)
    carry = run([window(0, 3), window(1, 0), window(2, 0, 5)], carry=carry)
    np.testing.assert_array_equal(results(carry[2]), NOTHING)
    carry = run([window(3, 1, 1)], carry=carry)
    assert np.isfinite(results(carry[2])).all()


@pytest.mark.parametrize(
    "other",
    [
        window(98, 3),
        window(98, 0, 0),
        [*window(98, 1), Microbatch(NAN), *window(99, 1)],
        [Microbatch([np.full_like(g, np.inf) for g in NAN]), *window(99, 1)],
        window(98, 0.99 * 2.0**-41, 0.99 * 2.0**-41),
        window(98, 2.0**39, 1.01 * 2.0**39),
        window(98, 1e20, 1e20),
    ],
    ids=["one", "weightless", "nan", "inf", "tiny weights", "huge sum", "huge weights"],
)
def test_a_window_that_is_left_out_changes_nothing(other):
    """Not in the middle of others, either: nothing of it reaches the next window."""
    found = run([WINDOWS[0], other, *WINDOWS[1:]])[2]
    np.testing.assert_array_equal(results(found), results(run(WINDOWS)[2]))


def test_rejected_microbatches_leave_no_trace():
    tx = accumulate(9, optax.sgd(0.1), should_skip_update_fn=optax.skip_not_finite)
    finite = [[Microbatch(NAN, 5.0), *w[:1], Microbatch(NAN), *w[1:]] for w in WINDOWS]
    negative = [[*w[:1], Microbatch(draw(9), -1.0), *w[1:]] for w in finite]
    noise = run(negative, tx)[2]
    np.testing.assert_array_equal(results(noise), results(run(WINDOWS, tx)[2]))
    assert noise.skipped == 3 * len(WINDOWS)


# The windows weigh 4 to 11, which is then nearly 2**-40 and 2**40.
@pytest.mark.parametrize("factor", [1.01 * 2.0**-42, 0.99 * 2.0**40 / 11])
def test_large_and_small_weights_scale_the_batch_size(factor):
    """The unit of weights is the unit of `batch_size`; signal and gradients have none."""
    scaled = [[Microbatch(m.gradient, m.weight * factor) for m in w] for w in WINDOWS]
    trace, signal, size = reference.noise_scale(WINDOWS)
    expected = trace * factor, signal, size * factor
    np.testing.assert_allclose(results(run(scaled)[2]), expected, rtol=1e-5)


@pytest.mark.parametrize("values", [(1, -1), (0, 0)])
def test_a_signal_that_is_not_positive_means_an_infinite_batch(values):
    noise = run([[Microbatch([np.full(p.shape, x, p.dtype) for p in PARAMS]) for x in values]])[2]
    assert noise.signal <= 0 <= noise.trace
    assert noise.batch_size == np.inf


def test_a_window_measured_in_part_follows_the_formula():
    """The formula of the docstring, for the second and third of three microbatches."""
    first, *measured = microbatches = window(0, 1, 2, 3)
    params, state, noise = run([])
    _, state = TX.update(first.gradient, state, params, weight=first.weight)
    noise = run([measured], carry=(params, state, noise))[2]
    gradients = [[np.asarray(g, float) for g in m.gradient] for m in microbatches]
    squares = [sum((g**2).sum() for g in gradient) for gradient in gradients]
    mean = [(a + 2 * b + 3 * c) / 6 for a, b, c in zip(*gradients, strict=True)]
    square = sum((g**2).sum() for g in mean)
    trace = (2 * squares[1] + 3 * squares[2] - 5 * square) / (2 - 5 / 6)
    np.testing.assert_allclose(results(noise)[:2], (trace, square - trace / 6), rtol=1e-5)
    # All but a thousandth of the weight in one microbatch: only rounding would be left.
    params, state, fresh = run([])
    _, state = TX.update(first.gradient, state, params, weight=1e-4)
    noise = run([measured[:1]], carry=(params, state, fresh))[2]
    np.testing.assert_array_equal(results(noise), NOTHING)


@pytest.mark.parametrize("jitted_step", [False, True], ids=["eager", "jit"])
def test_no_nan_arises_before_the_first_estimate(jitted_step):
    """JAX would report one as an error."""

    def step(params, state, noise, grads):
        params, state = apply_gradients(TX, grads, state, params)
        noise = update_noise_scale(noise, grads, state)
        return params, state, noise, (noise.trace, noise.signal, noise.batch_size)

    with jax.debug_nans(True):
        run_step = jax.jit(step) if jitted_step else step
        params, state, noise = PARAMS, TX.init(PARAMS), init_noise_scale()
        np.testing.assert_array_equal(results(noise), NOTHING)
        for m in WINDOWS[0]:
            params, state, noise, _ = run_step(params, state, noise, m.gradient)
        window_metrics(TX.init(PARAMS))


def test_a_window_whose_release_was_not_measured_is_left_out():
    *opened, last = WINDOWS[1]
    params, state, noise = run(WINDOWS[:1])
    for m in opened:
        params, state, noise = jitted(TX)(params, state, noise, m.gradient, m.weight, False)
    _, state = TX.update(last.gradient, state, params, weight=last.weight, release=True)
    noise = run(WINDOWS[2:], carry=(params, state, noise))[2]
    expected = reference.noise_scale([WINDOWS[0], *WINDOWS[2:]])
    np.testing.assert_allclose(results(noise), expected, rtol=1e-5)


@pytest.mark.parametrize("k", [1, jnp.int32(1)], ids=["constant", "array"])
def test_at_k_1_there_is_nothing_to_compare(k):
    tx = accumulate(k, optax.sgd(0.1))
    carry = PARAMS, tx.init(PARAMS), init_noise_scale()
    for m in window(0, 1, 2):
        carry = jitted(tx)(*carry, m.gradient, m.weight)
    np.testing.assert_array_equal(results(carry[2]), NOTHING)


def test_eager_is_jitted_is_a_static_release():
    def static(*args):
        return step(TX, *args[:-1], bool(args[-1]))

    expected = run(WINDOWS[:2])[2]
    for found in (
        run(WINDOWS[:2], step_fn=functools.partial(step, TX)),
        run(WINDOWS[:2], step_fn=static),
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[2], expected)


@pytest.mark.parametrize("kind", ["chain", "TrainState", "nnx"])
def test_the_state_is_found(kind):
    grads = [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}]
    params, tx, noise = {"w": jnp.zeros(2)}, accumulate(2, optax.sgd(0.1)), init_noise_scale()
    if kind == "nnx":
        model = nnx.Dict(w=nnx.Param(params["w"]))
        optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
        grads = [nnx.state(nnx.Dict(w=nnx.Param(g["w"]))) for g in grads]

        @nnx.jit
        def take_in(model, optimizer, noise, g):
            optimizer.update(model, g)
            return update_noise_scale(noise, g, optimizer.opt_state)

        for g in grads:
            noise = take_in(model, optimizer, noise, g)
    else:
        tx = optax.chain(optax.clip(10.0), tx) if kind == "chain" else tx
        state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
        for g in grads:
            state = state.apply_gradients(grads=g)
            noise = update_noise_scale(noise, g, state.opt_state)
    np.testing.assert_allclose(results(noise), (2, 3, 2 / 3), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_device_is_a_sample(k, weighted):
    """Also if only one has rows in a microbatch, or one refuses a weight. See what is sent."""
    mesh = meshes.make_mesh(AxisType.Auto)
    tx = accumulate(k, optax.adam(0.1), reduce_axes="data")
    with jax.set_mesh(mesh):
        specs = P(), state_shardings(tx, PARAMS, P()), P()

    def device_step(params, state, noise, grads, weight):
        own = [g[0] for g in grads]
        return step(tx, params, state, noise, own, weight[0] if weighted else None)

    device_step = jax.jit(
        jax.shard_map(
            device_step, mesh=mesh, in_specs=(*specs, P("data"), P("data")), out_specs=specs
        )
    )
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs[1])
    carry, windows = (PARAMS, jax.jit(init)(PARAMS), init_noise_scale()), []
    odd = np.array([5, 0, 0, 0, -1, np.nan, 1e-35, 2.0**126])
    for i in range(3):
        windows.append([])
        for j in range(k):
            weights = odd if weighted and (i, j) == (1, 0) else 1.0 + (np.arange(8) + j) % 3
            parts = [draw(100 * i + 10 * j + d) for d in range(8)]
            grads = [np.stack(leaves) for leaves in zip(*parts, strict=True)]
            carry = device_step(*carry, grads, jnp.asarray(weights, jnp.float32))
            counted = np.where((weights > 1e-30) & (weights < 1e30), weights, 0)
            counted = counted if weighted else np.ones(8)
            windows[-1] += map(Microbatch, parts, counted)
        found = results(carry[2])
        np.testing.assert_allclose(found, reference.noise_scale(windows), rtol=2e-5)
    size = sum(p.nbytes for p in PARAMS)
    compiled = device_step.lower(*carry, grads, jnp.ones(8)).compile()
    assert collectives(compiled) == ([3 * 4], [4, size, size + 4])  # of the release, and measured


@pytest.mark.parametrize("reduce_axes", [(), "data"], ids=["pieces", "pieces of parts"])
def test_pieces_of_a_model_have_one_norm(reduce_axes):
    """In `jax.shard_map` over parts of the model the norm is that of all parts."""
    mesh = meshes.make_mesh(AxisType.Auto, (2, 4), ("data", "model"))
    tx = accumulate(2, optax.sgd(0.1), reduce_axes=reduce_axes)
    params = [jnp.zeros(16), jnp.zeros(3)]
    places, rows = [P("model"), P()], P(reduce_axes or None)
    with jax.set_mesh(mesh):
        specs = places, state_shardings(tx, params, places), P()

    def device_step(params, state, noise, grads):
        return step(tx, params, state, noise, [g[0] for g in grads], None)

    device_step = jax.shard_map(
        device_step, mesh=mesh, in_specs=(*specs, [P(*rows, *p) for p in places]), out_specs=specs
    )
    parts = 2 if reduce_axes else 1
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=(places,), out_specs=specs[1])
    carry, microbatches = (params, jax.jit(init)(params), init_noise_scale()), []
    for i in range(2):
        own = [draw(10 * i + d, params) for d in range(parts)]
        grads = [np.stack(leaves) for leaves in zip(*own, strict=True)]
        carry = jax.jit(device_step)(*carry, grads)
        microbatches += map(Microbatch, own)
    expected = reference.noise_scale([microbatches])
    np.testing.assert_allclose(results(carry[2]), expected, rtol=1e-5)


@meshes.needs_reshard
def test_unreduced_gradients_are_refused():
    mesh = meshes.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        tx = accumulate(2, optax.sgd(0.1))
        grads = {
            "w": jax.ShapeDtypeStruct(
                (8,), jnp.float32, sharding=jax.NamedSharding(mesh, P(unreduced={"data"}))
            )
        }
        state = tx.init({"w": jnp.zeros(8)})
        with pytest.raises(TypeError, match=r"gradient leaf \['w'\] is unreduced over \['data'\]"):
            jax.eval_shape(update_noise_scale, init_noise_scale(), grads, state)


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, "0.9", True, np.float32("nan"), None, jnp.ones(2)])
def test_another_decay_is_refused(decay):
    with pytest.raises((TypeError, ValueError), match="`decay` must be"):
        update_noise_scale(init_noise_scale(), PARAMS, TX.init(PARAMS), decay=decay)


def test_a_decay_may_be_traced():
    found = jax.jit(lambda d: run(WINDOWS, step_fn=functools.partial(step, TX, decay=d))[2])(0.5)
    np.testing.assert_allclose(results(found), reference.noise_scale(WINDOWS, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, r"`noise` must be .*, got NoneType; the order is \(noise, grads"),
        ({"weight": jnp.ones(2)}, "`weight` must be a scalar"),
        ({"loss_reduction": "total"}, "`loss_reduction` must be 'mean' or 'sum'"),
        ({"opt_state": ()}, "`opt_state` holds no AccumulateState"),
        (
            {"opt_state": jax.vmap(lambda _: TX.init(PARAMS))(jnp.ones(3))},
            r"jax\.vmap\(update_noise",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    options = {"noise": init_noise_scale(), "grads": PARAMS, "opt_state": TX.init(PARAMS)}
    with pytest.raises((TypeError, ValueError), match=message):
        update_noise_scale(**options | change)

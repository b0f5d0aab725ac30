"""The gradient noise scale: against plain NumPy and the truth, and what must not disturb it."""

import functools

from helpers import meshes
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, get_state, noise_scale, state_shardings

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
MODES = ("first", "all")
each_mode = pytest.mark.parametrize("mode", MODES)
K = 4


def square(tree):
    return sum(float(np.sum(np.abs(np.asarray(x, np.complex128)) ** 2)) for x in tree.values())


def oracle(mode, windows, decay=0.99):
    """Returns trace, signal and their ratio, of windows of (weight, gradients, accepted)."""
    averages = np.zeros(3)
    for window in windows:
        held = [(w, g) for w, g, accepted in window if accepted and w > 0]
        total = sum(w for w, _ in held)
        if not held:
            continue
        mean = {name: sum(w * np.asarray(g[name]) for w, g in held) / total for name in held[0][1]}
        measured = held[:1] if mode == "first" else held
        weight = sum(w for w, _ in measured)
        freedom = len(measured) - weight / total
        if freedom <= 0:
            continue
        spread = sum(w * square(g) for w, g in measured) - weight * square(mean)
        trace = spread / freedom
        signal = square(mean) - trace / total
        if np.isfinite(trace) and np.isfinite(signal):
            averages = decay * averages + (1 - decay) * np.array([trace, signal, 1])
    trace, signal = averages[:2] / averages[2]
    return trace, signal, trace / signal if signal > 0 else np.inf


@functools.cache
def measuring(mode):
    """Returns one transformation for many tests, which trace and compile it once."""
    return accumulate(K, optax.sgd(0.1), measure_noise=mode)


@functools.cache
def compiled(tx):
    return jax.jit(functools.partial(apply_gradients, tx))


def gradients(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: (1 + rng.normal(size=p.shape)).astype(dtype) for name, p in PARAMS.items()}


def run(tx, windows, *, params=None, state=None, step=None, release=None):
    """Returns the state after windows of (weight, gradients, accepted), the last one closed."""
    params = PARAMS if params is None else params
    state = tx.init(params) if state is None else state
    step = step or compiled(tx)
    for window in windows:
        for i, (weight, grads, _) in enumerate(window):
            last = jnp.asarray(i + 1 == len(window))
            due = last if release is None else release(last)
            params, state = step(grads, state, params, weight=jnp.float32(weight), release=due)
    return state


WINDOWS = [
    [(w, gradients(10 * i + j), True) for j, w in enumerate(weights)]
    for i, weights in enumerate([(1, 2, 3, 4), (3, 0.5, 0, 7), (5, 5), (0, 2, 9), (1, 1, 1, 1)])
]


@each_mode
@pytest.mark.parametrize("decay", [0.0, 0.5])  # the tests below have the default
def test_as_plain_numpy(mode, decay):
    tx = accumulate(K, optax.adam(0.1), measure_noise=mode, noise_decay=decay)
    found = noise_scale(run(tx, WINDOWS))
    np.testing.assert_allclose(found, oracle(mode, WINDOWS, decay), rtol=1e-5)


@each_mode
def test_of_gradients_of_sums(mode):
    """What is divided by the weights afterwards is the same gradient."""
    summed = [
        [(w, {name: x * np.float32(w) for name, x in g.items()}, a) for w, g, a in window]
        for window in WINDOWS
    ]
    tx = accumulate(K, optax.adam(0.1), measure_noise=mode, loss_reduction="sum")
    np.testing.assert_allclose(noise_scale(run(tx, summed)), oracle(mode, WINDOWS), rtol=1e-5)


@each_mode
def test_of_sums_for_the_inner_optimizer(mode):
    tx = accumulate(K, optax.adam(0.1), measure_noise=mode, use_grad_mean=False)
    np.testing.assert_allclose(noise_scale(run(tx, WINDOWS)), oracle(mode, WINDOWS), rtol=1e-5)


@each_mode
def test_of_complex_and_narrow_gradients(mode):
    params = {"w": jnp.zeros((2, 3), jnp.complex64), "b": jnp.zeros(4, jnp.bfloat16)}
    rng = np.random.default_rng(0)

    def draw():
        w = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
        b = jnp.asarray(rng.normal(size=4), jnp.bfloat16)
        return {"w": w.astype(np.complex64), "b": np.asarray(b)}

    windows = [[(2, draw(), True) for _ in range(3)]]
    tx = accumulate(3, optax.sgd(0.0), measure_noise=mode)
    exact = [
        [(w, {name: x.astype(np.complex128) for name, x in g.items()}, a) for w, g, a in window]
        for window in windows
    ]
    np.testing.assert_allclose(
        noise_scale(run(tx, windows, params=params)), oracle(mode, exact), rtol=1e-5
    )


@each_mode
def test_without_bias(mode):
    """Over 20,000 windows of unequal weights both moments are right to their standard errors."""
    count, size, signal, variance = 20_000, 6, 0.7, 1.3
    weights = jnp.array([1.0, 3.0, 0.5, 8.0])
    tx = accumulate(K, optax.sgd(0.0), measure_noise=mode, noise_decay=0.0)
    params = jnp.zeros(size)

    def window(key):
        """One window with a state of its own: with no decay it is the last estimate."""

        def microbatch(state, given):
            weight, key = given
            noise = jax.random.normal(key, (size,)) * jnp.sqrt(variance / weight)
            return tx.update(signal + noise, state, params, weight=weight)[::-1]

        state, _ = jax.lax.scan(microbatch, tx.init(params), (weights, jax.random.split(key, K)))
        return noise_scale(state)

    found = jax.jit(jax.vmap(window))(jax.random.split(jax.random.key(1), count))
    for estimates, truth in ((found.trace, size * variance), (found.signal, size * signal**2)):
        estimates = np.asarray(estimates, np.float64)
        error = estimates.std() / np.sqrt(count)
        assert abs(estimates.mean() - truth) < 4 * error
        assert error < 0.02 * truth


@pytest.mark.slow
def test_all_is_more_precise_than_first():
    def deviation(mode):
        tx = accumulate(8, optax.sgd(0.0), measure_noise=mode, noise_decay=0.0)
        params = jnp.zeros(64)

        def window(key):
            draws = jax.random.normal(key, (8, 64))
            state, _ = jax.lax.scan(
                lambda state, g: tx.update(g, state, params)[::-1], tx.init(params), draws
            )
            return noise_scale(state).trace

        return float(jax.vmap(window)(jax.random.split(jax.random.key(0), 2000)).std())

    assert deviation("first") > 2 * deviation("all")


@each_mode
def test_nothing_is_known_before_a_window_of_two(mode):
    tx = accumulate(2, optax.sgd(0.1), measure_noise=mode)
    state = tx.init(PARAMS)
    assert all(np.isnan(noise_scale(state)))
    state = run(tx, [[(1, gradients(0), True)]], state=state)
    assert all(np.isnan(noise_scale(state)))
    state = run(tx, [[(1, gradients(0), True), (1, gradients(1), True)]], state=state)
    assert all(np.isfinite(noise_scale(state)))


@each_mode
def test_a_window_of_one_microbatch_keeps_what_is_known(mode):
    tx = measuring(mode)
    short = [*WINDOWS, [(3, gradients(99), True)], [(0, gradients(98), True)]]
    np.testing.assert_array_equal(noise_scale(run(tx, short)), noise_scale(run(tx, WINDOWS)))


@each_mode
def test_rejected_microbatches_are_not_measured(mode):
    tx = accumulate(
        K, optax.sgd(0.1), measure_noise=mode, should_skip_update_fn=optax.skip_not_finite
    )
    bad = {"w": np.full((2, 3), np.nan, np.float32), "b": np.zeros(4, np.float32)}
    with_bad = [[(5, bad, False), *w[:1], (5, bad, False), *w[1:]] for w in WINDOWS]
    found = noise_scale(run(tx, with_bad))
    np.testing.assert_allclose(found, oracle(mode, with_bad), rtol=1e-5)
    np.testing.assert_array_equal(found, noise_scale(run(tx, WINDOWS)))


@each_mode
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_ends_with_its_window(mode, value):
    bad = {"w": np.full((2, 3), value, np.float32), "b": np.zeros(4, np.float32)}
    poisoned = [(1, gradients(0), True), (1, bad, True), (1, gradients(1), True)]
    tx = measuring(mode)
    found = noise_scale(run(tx, [WINDOWS[0], poisoned, *WINDOWS[1:]]))
    np.testing.assert_array_equal(found, noise_scale(run(tx, WINDOWS)))


def test_a_signal_that_is_not_positive():
    tx = accumulate(2, optax.sgd(0.1), measure_noise="all")
    state = tx.init(jnp.zeros(1))
    for g in (1.0, -1.0):
        _, state = tx.update(jnp.array([g]), state)
    assert noise_scale(state).signal < 0
    assert noise_scale(state).batch_size == jnp.inf


@pytest.mark.slow
@each_mode
def test_eager_is_jitted_is_a_static_release(mode):
    tx = accumulate(K, optax.adam(0.1), measure_noise=mode)
    jitted = run(tx, WINDOWS[:2])
    eager = run(tx, WINDOWS[:2], step=functools.partial(apply_gradients, tx))
    static = jax.jit(functools.partial(apply_gradients, tx), static_argnames="release")
    static = run(tx, WINDOWS[:2], step=static, release=bool)
    for other in (eager, static):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jitted, other
        )


@pytest.mark.slow
@each_mode
def test_members_of_a_vmap(mode):
    tx = accumulate(K, optax.adam(0.1), measure_noise=mode)
    members = [
        [[(w, gradients(1000 * m + i), True) for i, w in enumerate((1, 2, 3, 4))]] for m in (0, 1)
    ]
    alone = [run(tx, windows) for windows in members]
    step = jax.jit(jax.vmap(functools.partial(apply_gradients, tx)))
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    params = stack(PARAMS, PARAMS)
    state = jax.vmap(tx.init)(params)
    for i in range(4):
        grads = stack(members[0][0][i][1], members[1][0][i][1])
        weight = jnp.full(2, members[0][0][i][0], jnp.float32)
        params, state = step(grads, state, params, weight=weight)
    found = jax.vmap(noise_scale)(state)
    for m in (0, 1):
        jax.tree.map(
            lambda x, y, m=m: np.testing.assert_allclose(x[m], y, rtol=1e-5),
            found,
            noise_scale(alone[m]),
        )


@each_mode
def test_at_the_constant_one_nothing_is_measured(mode):
    tx = accumulate(1, optax.sgd(0.1), measure_noise=mode)
    state = run(tx, [[(1, gradients(0), True)], [(1, gradients(1), True)]], release=lambda _: None)
    assert all(np.isnan(noise_scale(state)))


def _device_program(tx, mesh):
    specs = state_shardings(tx, PARAMS, P())

    def step(grads, state, params, weight):
        own = jax.tree.map(lambda x: x[0], grads)
        return apply_gradients(tx, own, state, params, weight=weight[0])

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P("data"), specs, P(), P("data")), out_specs=(P(), specs)
    )
    return jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)), jax.jit(step)


@each_mode
@pytest.mark.parametrize("k", [1, 3])
def test_every_device_is_a_sample(mode, k):
    mesh = meshes.make_mesh(AxisType.Auto)
    tx = accumulate(k, optax.adam(0.1), measure_noise=mode, reduce_axes="data")
    with jax.set_mesh(mesh):
        init, step = _device_program(tx, mesh)
        params, state = PARAMS, init(PARAMS)
        windows = []
        for i in range(2):
            calls = [
                [(float(1 + (d + j) % 3), gradients(1000 * i + 100 * j + d)) for d in range(8)]
                for j in range(k)
            ]
            for call in calls:
                weight = jnp.array([w for w, _ in call])
                grads = jax.tree.map(lambda *x: jnp.stack(x), *(g for _, g in call))
                params, state = step(grads, state, params, weight)
            # The oracle's "first" takes one sample; here it is the first call of each device.
            measured = calls[:1] if mode == "first" else calls
            windows.append((measured, calls))
    np.testing.assert_allclose(noise_scale(state), _oracle_of_devices(windows), rtol=2e-5)


def _oracle_of_devices(windows, decay=0.99):
    averages = np.zeros(3)
    for measured, calls in windows:
        held = [pair for call in calls for pair in call]
        chosen = [pair for call in measured for pair in call]
        total, weight = sum(w for w, _ in held), sum(w for w, _ in chosen)
        mean = {name: sum(w * g[name].astype(float) for w, g in held) / total for name in PARAMS}
        spread = sum(w * square(g) for w, g in chosen) - weight * square(mean)
        trace = spread / (len(chosen) - weight / total)
        averages = decay * averages + (1 - decay) * np.array(
            [trace, square(mean) - trace / total, 1]
        )
    trace, signal = averages[:2] / averages[2]
    return trace, signal, trace / signal if signal > 0 else np.inf


@each_mode
def test_pieces_of_a_model_have_one_norm(mode):
    """In `jax.shard_map` over parts of the model the norm is that of all parts."""
    mesh = meshes.make_mesh(AxisType.Auto, names=("model",))
    tx = accumulate(2, optax.sgd(0.1), measure_noise=mode)
    params = {"w": jnp.zeros(16), "b": jnp.zeros(3)}
    own = {"w": P("model"), "b": P()}
    specs = state_shardings(tx, params, own)
    step = jax.jit(
        jax.shard_map(
            functools.partial(apply_gradients, tx),
            mesh=mesh,
            in_specs=(own, specs, own),
            out_specs=(own, specs),
        )
    )
    rng = np.random.default_rng(0)
    state, window = tx.init(params), []
    for _ in range(2):
        grads = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in params.items()}
        window.append((1, grads, True))
        params, state = step(grads, state, params)
    np.testing.assert_allclose(noise_scale(state), oracle(mode, [window]), rtol=1e-5)


@meshes.needs_reshard
def test_unreduced_gradients_have_no_norm():
    mesh = meshes.make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1), measure_noise="first", reduce_axes="data")
    with jax.set_mesh(mesh), pytest.raises(TypeError, match=r"jax\.shard_map"):
        tx.init(jax.device_put(PARAMS, jax.NamedSharding(mesh, P())))


@pytest.mark.parametrize("mode", ["one", 1, True, ("first",)])
def test_another_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r"`measure_noise` must be None, 'first' or 'all', got"):
        accumulate(4, measure_noise=mode)


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, "0.9", True, np.float32("nan"), None, jnp.ones(2)])
def test_another_decay_is_refused(decay):
    with pytest.raises((TypeError, ValueError), match="`noise_decay` must be"):
        accumulate(4, measure_noise="all", noise_decay=decay)


def test_a_state_without_a_measurement():
    old, new = accumulate(4), accumulate(4, measure_noise="first")
    state = old.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"build it with `accumulate\(..., measure_noise='first'\)"
    ):
        noise_scale(state)
    with pytest.raises(ValueError, match=r"`state._replace\(noise=tx.init\(params\).noise\)`"):
        new.update(PARAMS, state)
    _, state = new.update(PARAMS, state._replace(noise=new.init(PARAMS).noise))
    assert float(state.noise.samples.count) == 1


@each_mode
def test_a_measurement_outlives_a_run_without(mode):
    """Windows of a transformation that does not measure tell nothing, also in part."""
    on, off = accumulate(4, measure_noise=mode), accumulate(4)
    state = run(on, WINDOWS[:1])
    known = noise_scale(state)
    state = run(off, WINDOWS[1:3], state=state)
    np.testing.assert_array_equal(noise_scale(state), known)
    _, state = on.update(gradients(0), state)
    for i in range(3):
        _, state = off.update(gradients(1 + i), state)
    np.testing.assert_array_equal(noise_scale(state), known)
    _, state = off.update(gradients(4), state)  # the first of a window that is measured later
    held = [gradients(4 + i) for i in range(4)]
    for grads in held[1:]:
        _, state = on.update(grads, state)
    mean = {name: sum(g[name] for g in held) / 4 for name in PARAMS}
    measured = held[1:2] if mode == "first" else held[1:]
    freedom = len(measured) * (1 - 1 / 4)
    trace = (sum(map(square, measured)) - len(measured) * square(mean)) / freedom
    expected = (0.99 * oracle(mode, WINDOWS[:1])[0] + trace) / 1.99
    np.testing.assert_allclose(noise_scale(state).trace, expected, rtol=1e-5)


@each_mode
@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e10, 1e25])
def test_large_and_small_weights(mode, factor):
    """Where sums have no squares in float32, a window tells nothing rather than something wrong."""
    tx = measuring(mode)
    found = noise_scale(run(tx, [[(w * factor, g, True) for w, g, _ in WINDOWS[0]]]))
    if 1e-12 < factor < 1e12:
        trace, signal, _ = oracle(mode, WINDOWS[:1])
        np.testing.assert_allclose((found.trace / factor, found.signal), (trace, signal), rtol=1e-5)
    else:
        assert all(np.isnan(found))


def test_a_window_that_hardly_tells_anything_does_not_count():
    """Its first microbatch has nearly all the weight: all that is left of the rest is rounding."""
    tx = measuring("first")
    heavy = [(1e6, gradients(0), True), (1, gradients(1), True)]
    state = run(tx, WINDOWS)
    before = noise_scale(state).trace
    assert noise_scale(run(tx, [heavy], state=state)).trace == before


@each_mode
def test_in_double_precision(x64, mode):
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.float32)}
    tx = accumulate(2, optax.sgd(0.1), measure_noise=mode)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.noise)} == {jnp.dtype(jnp.float32)}
    step, seen = jax.jit(functools.partial(apply_gradients, tx)), []
    for i in range(4):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients(i), params)
        seen.append((1, grads, True))
        before, (params, state) = state, step(grads, state, params)
        jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), before, state)
    expected = oracle(mode, [seen[:2], seen[2:]])
    np.testing.assert_allclose(noise_scale(state), expected, rtol=1e-5)


@each_mode
def test_integer_parameters_have_no_norm(mode):
    params = PARAMS | {"steps": jnp.arange(3)}
    windows = [[(w, g | {"steps": None}, True) for w, g, _ in WINDOWS[0]]]
    tx = measuring(mode)
    found = noise_scale(run(tx, windows, params=params))
    np.testing.assert_allclose(found, oracle(mode, WINDOWS[:1]), rtol=1e-5)


def test_a_trace_that_is_negative():
    tx = accumulate(2, optax.sgd(0.1), measure_noise="first")
    state = tx.init(jnp.zeros(1))
    for g in (1.0, 3.0):
        _, state = tx.update(jnp.array([g]), state)
    assert noise_scale(state).trace < 0
    assert noise_scale(state).batch_size < 0


def test_found_inside_a_chain():
    tx = optax.chain(optax.clip(10.0), accumulate(2, optax.sgd(0.1), measure_noise="all"))
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(gradients(i), state, PARAMS)
    assert np.isfinite(noise_scale(state).batch_size)
    assert get_state(state).noise.averages.mass > 0


def test_the_decay_may_be_a_hyperparameter():
    tx = optax.inject_hyperparams(accumulate, static_args=("every_k", "inner", "measure_noise"))(
        2, optax.sgd(0.1), measure_noise="all", noise_decay=0.25
    )
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(gradients(i), state, PARAMS)
    assert get_state(state).noise.averages.mass == 0.75

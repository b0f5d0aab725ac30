"""`check_step` takes training loops as people write them, and says which mistake they make."""

import functools

from flax import linen, nnx
from flax.training import train_state
from helpers import trained
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum.testing import check_step, gradients, runs, step

ROWS, FEATURES, K = trained.ROWS, trained.WIDTH, trained.K
PARAMS = trained.PARAMS
BATCH = {
    "x": trained.BATCH["x"],
    "y": trained.BATCH["y"],
    "mask": jnp.array([1.0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]),
}


def mean_loss(params, rows):
    return jnp.mean((jnp.tanh(rows["x"] @ params["w"] + params["b"]) - rows["y"]) ** 2)


def masked_loss(params, rows):
    each = jnp.sum((jnp.tanh(rows["x"] @ params["w"] + params["b"]) - rows["y"]) ** 2, 1)
    return jnp.sum(each * rows["mask"]) / jnp.sum(rows["mask"])


def coupled_loss(params, rows):
    z = jnp.tanh(rows["x"] @ params["w"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(
        z @ rows["y"].T, jnp.arange(len(z))
    ).mean()


def renamed_loss(params, rows):
    return masked_loss({"w": params["mu"], "b": params["ema"]}, rows)


RENAMED = {"mu": PARAMS["w"], "ema": PARAMS["b"]}


def plain(make_tx, loss=mean_loss, weight=None, divide=False, metrics=(), measure=False):
    """A loop with a transformation of Optax, which `make_tx(every_k)` builds."""

    def make_step(params, every_k):
        tx = make_tx(every_k)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, rows):
            params, opt_state, *noise = state
            value, grads = jax.value_and_grad(loss)(params, rows)
            if divide:
                grads = jax.tree.map(lambda g: g / every_k, grads)
            extra = {} if weight is None else {"weight": weight(rows)}
            extra |= dict.fromkeys(metrics, value)
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            noise = [optaccum.update_noise_scale(x, grads, opt_state) for x in noise]
            return (optax.apply_updates(params, updates), opt_state, *noise), value

        noise = [optaccum.init_noise_scale()] if measure else []
        return (params, tx.init(params), *noise), step

    return make_step


def chain_outside(inner):
    return lambda k: optax.chain(optaccum.accumulate(k), inner)


def inside(inner):
    return lambda k: optaccum.accumulate(k, inner)


def measured(inner):
    """With all that is kept beside the optimizer, under names of means and averages."""
    names = "avg_loss", "mu"
    tx_of = functools.partial(optaccum.accumulate, inner=inner, metrics=names)
    return plain(tx_of, metrics=names, measure=True)


def donated_twice(params, every_k):
    return (params, params), jax.jit(lambda state, rows: state, donate_argnums=0)


def multi(inner):
    return lambda k: optax.MultiSteps(inner, k)


SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


def linen_loop(model, tx_of, mutable=False):
    """A loop over `flax.training.train_state`."""

    class State(train_state.TrainState):
        batch_stats: object = None

    def make_step(variables, every_k):
        state = State.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=tx_of(every_k),
            batch_stats=variables.get("batch_stats"),
        )

        @jax.jit
        def step(state, rows):
            def loss(params):
                if not mutable:
                    return jnp.mean(
                        (state.apply_fn({"params": params}, rows["x"]) - rows["y"]) ** 2
                    ), None
                z, new = state.apply_fn(
                    {"params": params, "batch_stats": state.batch_stats},
                    rows["x"],
                    mutable=["batch_stats"],
                )
                return jnp.mean((z - rows["y"]) ** 2), new["batch_stats"]

            (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            state = state.apply_gradients(grads=grads)
            return state.replace(batch_stats=stats) if mutable else state

        return state, step

    return make_step


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x))
        return linen.Dense(3)(jnp.tanh(x))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(jnp.tanh(linen.Dense(8)(x)))


def linen_params(module):
    return module.init(jax.random.key(1), BATCH["x"])


class Network(nnx.Module):
    def __init__(self, normalize=False):
        rngs = nnx.Rngs(0)
        self.one, self.two = nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if normalize else jnp.tanh

    def __call__(self, x):
        return self.two(jnp.tanh(self.norm(self.one(x))))


def nnx_loop(tx_of, optimizer_type=nnx.Optimizer):
    """A loop over a module and an optimizer that `flax.nnx` changes in place."""

    def make_step(model, every_k):
        optimizer = optimizer_type(model, tx_of(every_k), wrt=nnx.Param)

        @nnx.jit
        def train(model, optimizer, rows):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(rows["x"]) - rows["y"]) ** 2))(
                model
            )
            optimizer.update(model, grads)
            return loss

        return (model, optimizer), lambda state, rows: train(*state, rows)

    return make_step


def by_hand(divide_by_k=True, key_per_call=None, clip=None, stale=False):
    """A sum of gradients kept by hand."""

    def make_step(params, every_k):
        opt = optax.adam(0.01)
        first = params

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, rows):
            def loss(params):
                x = rows["x"]
                if key_per_call is not None:
                    key = jax.random.key(3)
                    if key_per_call:
                        key = jax.random.fold_in(key, state["calls"])
                    x = x * jax.random.bernoulli(key, 0.5, x.shape)
                return mean_loss(params, {**rows, "x": x})

            grads = jax.grad(loss)(state["params"])
            if clip is not None:
                norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
                grads = jax.tree.map(lambda g: g * jnp.minimum(1, (clip or 0) / norm), grads)
            sums = jax.tree.map(jnp.add, state["sums"], grads)
            calls = state["calls"] + 1
            last = calls % every_k == 0
            mean = jax.tree.map(lambda s: s / (every_k if divide_by_k else 1), sums)
            updates, opt_state = opt.update(mean, state["opt_state"])

            def choose(a, b):
                return jax.tree.map(lambda x, y: jnp.where(last, x, y), a, b)

            return {
                "params": choose(optax.apply_updates(state["params"], updates), state["params"]),
                "opt_state": choose(opt_state, state["opt_state"]),
                "sums": choose(jax.tree.map(jnp.zeros_like, sums), sums),
                "calls": calls,
            }

        def stale_step(state, rows):
            new = step(state, rows)
            return {**new, "params": jax.tree.map(lambda a, b: a + 0 * b, new["params"], first)}

        state = {
            "params": params,
            "opt_state": opt.init(params),
            "sums": jax.tree.map(jnp.zeros_like, params),
            "calls": jnp.zeros([], jnp.int32),
        }
        return state, stale_step if stale else step

    return make_step


def inside_one_step(loss=mean_loss, weight_fn=None, fold=None):
    """The whole batch in one call, cut by `optaccum.value_and_grad` or by a scan by hand."""

    def make_step(params, every_k):
        tx = optax.adam(0.01)

        @jax.jit
        def step(state, rows):
            params, opt_state = state
            if fold is None:
                grads = optaccum.grad(loss, num_microbatches=every_k, weight_fn=weight_fn)(
                    params, rows
                )
            else:
                cut = jax.tree.map(
                    lambda x: x.reshape(-1, every_k, *x.shape[1:]).swapaxes(0, 1), rows
                )

                def body(total, own):
                    i, rows = own
                    key = jax.random.fold_in(jax.random.key(0), i) if fold else jax.random.key(0)
                    x = rows["x"] * jax.random.bernoulli(key, 0.5, rows["x"].shape)
                    grads = jax.grad(loss)(params, {**rows, "x": x})
                    return jax.tree.map(lambda t, g: t + g / every_k, total, grads), None

                zeros = jax.tree.map(jnp.zeros_like, params)
                grads, _ = jax.lax.scan(body, zeros, (jnp.arange(every_k), cut))
            updates, opt_state = tx.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state

        return (params, tx.init(params)), step

    return make_step


def with_average(per_release):
    """An average of the parameters beside the optimizer."""

    def make_step(params, every_k):
        tx = optaccum.accumulate(every_k, optax.adam(0.01))

        @jax.jit
        def step(state, rows):
            grads = jax.grad(mean_loss)(state["params"], rows)
            params, opt_state = optaccum.apply_gradients(
                tx, grads, state["opt_state"], state["params"]
            )
            ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], params)
            if per_release:
                released = optaccum.has_released(opt_state)
                ema = jax.tree.map(lambda a, b: jnp.where(released, a, b), ema, state["ema"])
            return {"params": params, "opt_state": opt_state, "ema": ema}

        return {"params": params, "opt_state": tx.init(params), "ema": params}, step

    return make_step


ADAM, SGD = optax.adam(0.01), optax.sgd(0.1)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.01))
STEPS = {
    "accumulate clipped": (None, plain(inside(CLIPPED))),
    "MultiSteps adam": (None, plain(multi(ADAM))),
    "bare in front of sgd": (None, plain(chain_outside(SGD))),
    "measured adam": (None, measured(ADAM)),
    "measured sgd": (None, measured(SGD)),
    "renamed": (
        None,
        plain(inside(ADAM), renamed_loss, lambda rows: rows["mask"].sum()),
        RENAMED,
    ),
    "rmsprop": (None, plain(inside(optax.rmsprop(0.01)))),
    "by hand": (None, by_hand()),
    "by hand clipped": ("clip", by_hand(clip=0.05)),
    "linen": (None, linen_loop(Dense(), inside(ADAM)), linen_params(Dense())),
    "nnx": (None, nnx_loop(inside(ADAM)), Network()),
    "average per release": (None, with_average(True)),
    "inside one step": (None, inside_one_step()),
    "inside, weighted": (None, inside_one_step(masked_loss, lambda p, rows: rows["mask"].sum())),
    "adam outside": ("optimizer", plain(chain_outside(ADAM))),
    "rmsprop outside": ("optimizer", plain(chain_outside(optax.rmsprop(0.01)))),
    "no accumulation": ("optimizer", plain(lambda k: optax.adam(0.01))),
    "schedule outside": (
        "schedule",
        plain(lambda k: optax.chain(optaccum.accumulate(k), optax.sgd(SCHEDULE))),
    ),
    "clip outside": (
        "clip",
        plain(lambda k: optax.chain(optax.clip_by_global_norm(0.05), optaccum.accumulate(k, ADAM))),
    ),
    "clip outside MultiSteps sgd": (
        "clip",
        plain(
            lambda k: optax.chain(
                optax.clip_by_global_norm(0.05), multi(SGD)(k).gradient_transformation()
            )
        ),
    ),
    "divided twice adam": ("divided_twice", plain(inside(ADAM), divide=True)),
    "summed": ("factor", by_hand(divide_by_k=False)),
    "no weights sgd": ("weights", plain(multi(SGD), masked_loss)),
    "no weights, renamed": ("weights", plain(inside(ADAM), renamed_loss), RENAMED),
    "inside, no weights": ("weights", inside_one_step(masked_loss)),
    "coupled": ("coupled", plain(inside(ADAM), coupled_loss)),
    "linen BatchNorm": (
        "batch_norm",
        linen_loop(Normalized(), inside(ADAM), mutable=True),
        linen_params(Normalized()),
    ),
    "nnx BatchNorm": ("batch_norm", nnx_loop(inside(ADAM)), Network(normalize=True)),
    "average per microbatch": ("ema", with_average(False)),
    "one key": ("dropout_keys", by_hand(key_per_call=False)),
    "a key each": ("stochastic", by_hand(key_per_call=True)),
    "inside, one key": ("dropout_keys", inside_one_step(fold=False)),
    "inside, a key each": ("stochastic", inside_one_step(fold=True)),
    "a buffer donated twice": ("donated", donated_twice),
    "a donated buffer": ("donated", by_hand(stale=True)),
}


@pytest.mark.filterwarnings("ignore:`accumulate` stands in front:UserWarning")
@pytest.mark.slow  # each compiles several training programs
@pytest.mark.parametrize("name", STEPS)
def test_the_mistake_is_named(name):
    kind, make_step, *params = STEPS[name]
    report = check_step(
        make_step,
        params[0] if params else PARAMS,
        BATCH,
        every_k=K,
        inside_step=name.startswith("inside"),
    )
    assert report.kind == kind, report
    unknown = kind in ("stochastic", "donated")
    assert report.exact is (None if unknown else kind is None)
    if kind is not None:
        assert report.remedy in str(report).replace("\n", " ")


@pytest.mark.slow
def test_a_small_learning_rate_hides_mistakes():
    """At 1e-7 parameters round to the same; means and sums of gradients do not."""
    found = []
    for inner in (optax.adam(1e-7), optax.sgd(1e-7)):
        report = check_step(plain(inside(inner), masked_loss), PARAMS, BATCH, every_k=K)
        found.append((report.exact, report.kind))
    assert found == [(False, "weights")] * 2
    report = check_step(plain(inside(optax.sgd(1e-7)), mean_loss), PARAMS, BATCH, every_k=K)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "raise the learning rate" in str(report)


def test_what_is_held_for_each_parameter_has_the_name_of_its_holder():
    """A parameter may be named as a mean; an accumulator's window has no names."""
    tx = optaccum.accumulate(2, optax.adam(0.1), metrics=("mu",))
    params = {"mu": jnp.ones(2), "w": jnp.ones(3)}
    program = runs.Program(lambda w, k: ((w, tx.init(w)), lambda *_: None), params, 2, False, None)
    run = program.located({"x": jnp.ones(4)}).run({"x": jnp.ones(4)}, 2, 1)
    names = {jax.tree_util.keystr(path): run.names(path) for path in run.held}
    assert names["[0]"] == ("0",)
    assert names["[1].grad_sum"] == names["[1].arg_sums['sum_of_mu']"] == ()
    assert names["[1].inner_state[0].mu"] == ("1", "inner_state", "0", "mu")
    assert names["[1].inner_state[0].count"] == ("1", "inner_state", "0", "count")


def test_a_failure_of_the_check_is_not_the_step_s(monkeypatch):
    monkeypatch.setattr(step, "distance", lambda *args: 1 / 0)
    report = check_step(plain(inside(SGD)), PARAMS, BATCH, every_k=K)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "could not be compared" in str(report)
    assert report.remedy == step.REPORT


@pytest.mark.slow
@pytest.mark.parametrize("store", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inner", [optax.sgd(1.0), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_low_precision_is_not_taken_for_a_mistake(store, inner):
    def loss(params, rows):
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return mean_loss(low, rows).astype(jnp.float32)

    params = jax.tree.map(lambda p: p.astype(store), PARAMS)
    report = check_step(plain(inside(inner), loss), params, BATCH, every_k=K)
    assert report.exact is not False
    if report.exact is None:
        assert report.remedy == step.COARSE


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "weights"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sign_sgd"])
def test_the_sign_of_rounding_is_no_mistake(optimizer, kind):
    """A gradient that is zero but for rounding, as of a bias in front of BatchNorm or of keys."""
    inner = getattr(optax, optimizer)(0.01)

    def loss(params, rows):
        rounding = 1e-9 if len(rows["x"]) == ROWS else -1e-9
        right = (mean_loss if kind is None else masked_loss)(params, rows)
        return right + rounding * params["flat"].sum()

    params = {**PARAMS, "flat": jnp.full(4, 0.1)}
    report = check_step(plain(inside(inner), loss), params, BATCH, every_k=K)
    assert report.kind == kind, report


@pytest.mark.slow
@pytest.mark.parametrize("name", trained.LAYOUTS)
def test_parameters_are_found_by_their_tree(name):
    make_step = trained.in_layout(name, lambda k: optaccum.accumulate(k, ADAM))
    program = runs.Program(make_step, trained.PARAMS, 2, False, None).located(trained.BATCH)
    first, held, released = program.run(trained.BATCH, 2, 1).params
    np.testing.assert_array_equal(np.sort(first), np.sort(gradients.flat(trained.PARAMS)))
    np.testing.assert_array_equal(held, first)
    assert (released != first).any()


def test_a_state_without_the_parameters_asks_for_get_params():
    def make_step(params, every_k):
        return {"flat": jnp.concatenate([x.ravel() for x in params.values()])}, lambda s, rows: s

    report = check_step(make_step, trained.PARAMS, trained.BATCH, every_k=2)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "`get_params`" in str(report.remedy)


def test_parameters_in_another_tree_are_found_by_the_name_params():
    flat = {"params": jnp.ones(18), "opt_state": jnp.zeros(18)}
    program = runs.Program(lambda w, k: (flat, lambda state, x: state), PARAMS, 2, False, None)
    run = program.located(trained.BATCH).run(trained.BATCH, 2, 1)
    assert run.params.tolist() == [[1.0] * 18] * 3


def test_a_step_that_moves_nothing_asks_for_get_params():
    report = check_step(lambda w, k: ((w, 0), lambda s, rows: s), PARAMS, BATCH, every_k=2)
    assert "no parameter moves" in str(report)
    assert "`get_params`" in str(report.remedy)


@pytest.mark.slow
@pytest.mark.parametrize("name", trained.BESIDE)
def test_what_moves_beside_the_parameters_is_named(name):
    """The remedy was tried: with what the full batch has of that leaf nothing is left."""
    kind, make_step = trained.BESIDE[name]
    report = check_step(make_step, trained.PARAMS, trained.BATCH, every_k=trained.K)
    assert report.kind == kind, report
    if kind is not None:
        assert "['extra']" in report.findings[0].detail
        assert report.left is None or report.left <= report.tolerance
        assert report.left is not None or name == "average that nothing reads"


@pytest.mark.slow
def test_the_remedy_for_what_moves_beside_the_parameters_works():
    """A normalizer that the release moves, by means over the window."""

    def make_step(params, every_k):
        tx = optaccum.accumulate(every_k, ADAM, metrics=("reward",))

        @jax.jit
        def step(state, rows):
            params, opt_state, mean = state

            def loss(params):
                return jnp.mean(trained.outputs(params, rows)[:, 0] * (rows["reward"] - mean))

            grads = jax.grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params, reward=rows["reward"].mean())
            found = optaccum.window_metrics(opt_state, grads)["reward"]
            new = jnp.where(optaccum.has_released(opt_state), 0.9 * mean + 0.1 * found, mean)
            return optax.apply_updates(params, updates), opt_state, new

        return (params, tx.init(params), jnp.float32(0)), step

    assert check_step(make_step, trained.PARAMS, trained.BATCH, every_k=trained.K).exact


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "kind"), [("sign_sgd", "weights"), ("rprop", "coupled")])
def test_an_accumulator_shows_gradients_that_the_optimizer_hides(optimizer, kind):
    loss = masked_loss if kind == "weights" else coupled_loss
    make_step = plain(inside(getattr(optax, optimizer)(0.01)), loss)
    report = check_step(make_step, PARAMS, BATCH, every_k=K)
    assert report.kind == kind, report
    if kind == "weights":
        assert "batch['mask'].sum()" in report.findings[0].detail
        assert report.left <= report.tolerance


def test_weights_that_should_not_be_are_told():
    make_step = plain(inside(ADAM), mean_loss, lambda rows: rows["mask"].sum())
    report = check_step(make_step, PARAMS, BATCH, every_k=K)
    assert report.kind == "weights", report
    assert "drop `weight=`" in str(report.remedy)


def test_mistakes_that_cancel_in_one_window_are_found_in_several():
    def make_step(params, every_k):
        @jax.jit
        def step(state, rows):
            params, sums, calls = state
            sums = jax.tree.map(jnp.add, sums, jax.grad(mean_loss)(params, rows))
            last = (calls + 1) % every_k == 0
            # The first two windows are right.
            rate = jnp.where(calls < 2 * every_k, 0.1, 0.1 * every_k) / every_k
            new = jax.tree.map(lambda p, s: jnp.where(last, p - rate * s, p), params, sums)
            sums = jax.tree.map(lambda s: jnp.where(last, 0, s), sums)
            return new, sums, calls + 1

        zeros = jax.tree.map(jnp.zeros_like, params)
        return (params, zeros, jnp.zeros([], jnp.int32)), step

    report = check_step(make_step, PARAMS, BATCH, every_k=K)
    assert report.exact is False, report


def test_a_step_that_is_not_finite_says_so():
    def loss(params, rows):
        return mean_loss(params, rows) * jnp.nan

    report = check_step(plain(inside(SGD), loss), PARAMS, BATCH, every_k=K)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "is not finite" in str(report)


def test_a_warm_up_from_a_small_rate_is_judged_by_its_larger_step():
    warm_up = optax.adamw(optax.warmup_cosine_decay_schedule(1e-6, 1e-2, 10, 1000))
    assert check_step(plain(inside(warm_up)), PARAMS, BATCH, every_k=K).exact


def test_a_make_step_that_raises_is_unknown():
    report = check_step(lambda w, k: 1 / 0, PARAMS, BATCH, every_k=2)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "the step could not be run" in str(report)


def test_a_step_that_raises_is_unknown():
    report = check_step(lambda w, k: (w, lambda state, x: 1 / 0), PARAMS, BATCH, every_k=2)
    assert (report.exact, report.kind) == (None, "unknown")
    assert "ZeroDivisionError" in str(report)


def test_a_step_that_returns_another_state_is_unknown():
    report = check_step(lambda w, k: (w, lambda state, x: [w]), PARAMS, BATCH, every_k=2)
    assert "must return the state" in str(report)

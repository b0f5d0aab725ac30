"""The fewest microbatches that fit are found from compiled programs alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

W = jax.ShapeDtypeStruct((8, 256), jnp.float32)
X = jax.ShapeDtypeStruct((512, 8), jnp.float32)


def _loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def _make_step(n, jit=True):
    value_and_grad = optaccum.value_and_grad(_loss, num_microbatches=n)

    def step(w, x):
        loss, grad = value_and_grad(w, x)
        return w - grad, loss

    return jax.jit(step, donate_argnums=0) if jit else step


def _peak(n):
    return optaccum.fit_num_microbatches(_make_step, [n], W, X, memory_limit=2**40).peak_bytes[n]


def test_the_fewest_that_fit_are_found_and_no_more_is_compiled():
    compiled = []

    def make_step(n):
        compiled.append(n)
        return _make_step(n)

    limit = _peak(8)
    fit = optaccum.fit_num_microbatches(make_step, (64, 8, 1, 2, 8, 32), W, X, memory_limit=limit)
    assert (fit.num_microbatches, fit.memory_limit) == (8, limit)
    assert compiled == [1, 2, 8] == list(fit.peak_bytes)
    assert fit.peak_bytes[1] > fit.peak_bytes[2] > fit.peak_bytes[8] == limit
    # Activations of the full batch, at least, and what is donated counts once.
    assert fit.peak_bytes[1] > 512 * 256 * 4
    assert limit < 512 * 256 * 4


def test_the_step_comes_with_it():
    w, x = jnp.ones(W.shape), jax.random.normal(jax.random.key(0), X.shape)
    fit = optaccum.fit_num_microbatches(_make_step, [4], w, x, memory_limit=1e9)
    expected = _make_step(4, jit=False)(w, x)
    for a, e in zip(fit.step(w, x), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_what_is_donated_counts_once_and_a_plain_function_donates_nothing():
    def peak(jit):
        fit = optaccum.fit_num_microbatches(
            lambda n: jit(lambda w: w + n), [4], W, memory_limit=2**40
        )
        return fit.peak_bytes[4]

    assert peak(lambda f: f) == 2 * 8 * 256 * 4
    assert peak(functools.partial(jax.jit, donate_argnums=0)) == 8 * 256 * 4


def test_a_compiler_that_runs_out_of_memory_says_that_it_does_not_fit():
    class TooMany:
        def __init__(self, message):
            self.message = message

        def lower(self, *args):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    def make_step(n, message="RESOURCE_EXHAUSTED: 20 of 16 GB"):
        return TooMany(message) if n < 4 else _make_step(n)

    fit = optaccum.fit_num_microbatches(make_step, [1, 2, 4], W, X, memory_limit=2**40)
    assert (fit.num_microbatches, fit.peak_bytes[1], fit.peak_bytes[2]) == (4, np.inf, np.inf)
    with pytest.raises(ValueError, match=r"none of `candidates` fits.*are 1: inf; try more"):
        optaccum.fit_num_microbatches(make_step, [1], W, X, memory_limit=2**40)
    broken = functools.partial(make_step, message="INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        optaccum.fit_num_microbatches(broken, [1], W, X, memory_limit=2**40)


def test_the_error_lists_all_peaks_if_nothing_fits():
    message = r"fits in 1,000 bytes; peak bytes by number of microbatches are 1: \d+,\d+,?\d*, 2: "
    with pytest.raises(ValueError, match=message):
        optaccum.fit_num_microbatches(_make_step, [2, 1], W, X, memory_limit=1000)


def test_arrays_that_the_step_closes_over_count():
    frozen = jnp.ones((1024, 1024))
    make_step = lambda n: jax.jit(lambda w: jnp.sum(frozen) + n + w)  # noqa: E731
    fit = optaccum.fit_num_microbatches(make_step, [1], W, memory_limit=2**40)
    assert fit.peak_bytes[1] >= frozen.nbytes


@pytest.mark.parametrize("library", ["equinox", "flax.nnx"])
def test_functions_that_others_jit_are_compiled(library):
    module = pytest.importorskip(library)
    jit = module.filter_jit if library == "equinox" else module.jit
    w, x = jnp.ones(W.shape), jnp.ones(X.shape)
    fit = optaccum.fit_num_microbatches(
        lambda n: jit(_make_step(n, jit=False)), [2, 4], w, x, memory_limit=_peak(4) * 1.1
    )
    assert fit.num_microbatches == 4
    assert len(fit.step(w, x)) == 2


class Device:
    device_kind = "a device"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


@pytest.mark.parametrize("stats", [None, {}])
def test_a_device_that_does_not_say_what_it_has_needs_a_limit(stats, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 1}), Device(stats)])
    with pytest.raises(ValueError, match="`memory_limit` is needed: a device does not say"):
        optaccum.fit_num_microbatches(_make_step, [1], W, X)


def test_the_smallest_device_is_the_limit(monkeypatch):
    limits = [2**40, _peak(2), 2**41]
    monkeypatch.setattr(
        jax, "local_devices", lambda: [Device({"bytes_limit": limit}) for limit in limits]
    )
    fit = optaccum.fit_num_microbatches(_make_step, [1, 2], W, X)
    assert (fit.num_microbatches, fit.memory_limit) == (2, limits[1])


@pytest.mark.parametrize(
    ("candidates", "limit", "error", "message"),
    [
        ([], 1e9, ValueError, "`candidates` must hold at least one"),
        (4, 1e9, TypeError, "`candidates` must be several integers, got 4"),
        ([1], True, ValueError, "`memory_limit` must be a number of bytes > 0, got True"),
        ([0], 1e9, ValueError, r"each of `candidates` must be >= 1, got 0"),
        ([2.5], 1e9, TypeError, r"each of `candidates` must be an integer >= 1, got 2\.5"),
        ([1], 0, ValueError, r"`memory_limit` must be a number of bytes > 0, got 0"),
        ([1], "16", ValueError, r"`memory_limit` must be a number of bytes > 0, got '16'"),
        ([3], 1e9, ValueError, r"`num_microbatches` 3 does not divide the 512 rows"),
    ],
)
def test_candidates_and_limits_that_cannot_be_are_refused(candidates, limit, error, message):
    with pytest.raises(error, match=message):
        optaccum.fit_num_microbatches(_make_step, candidates, W, X, memory_limit=limit)


def test_what_makes_steps_is_a_function_and_so_is_a_step():
    with pytest.raises(TypeError, match="`make_step` must be a function, got 3"):
        optaccum.fit_num_microbatches(3, [1], W, X, memory_limit=1e9)
    with pytest.raises(TypeError, match="what `make_step` returns must be a function, got None"):
        optaccum.fit_num_microbatches(lambda n: None, [1], W, X, memory_limit=1e9)


GRADS = jnp.ones(2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("16GiB", 16 * 2**30), ("1.5 mib", 1.5 * 2**20), ("700kB", 7e5), ("300b", 300)],
)
def test_memory_limits_may_be_text(text, expected):
    fit = optaccum.fit_num_microbatches(lambda n: lambda x: x, [1], GRADS, memory_limit=text)
    assert fit.memory_limit == expected


def test_text_that_is_no_limit_is_refused():
    def fit(limit):
        return optaccum.fit_num_microbatches(lambda n: lambda x: x, [1], GRADS, memory_limit=limit)

    for limit in ("much", "8", "1.2.3GB", "0GB"):
        with pytest.raises(ValueError, match=rf"bytes > 0, got '{limit}'; text is like '8GB'"):
            fit(limit)
    if not (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
        with pytest.raises(ValueError, match=r"is needed: cpu .* pass .*memory_limit='80GB'"):
            fit(None)

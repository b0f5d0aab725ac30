"""The programs of docs/switching.md, and what an old checkpoint says in a new program."""

import pathlib
import re

import equinox as eqx
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optaccum

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "switching.md").read_text()


@pytest.fixture(scope="module")
def names():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(code, "switching.md", "exec"), names)
    return names


def test_the_converted_state_is_there_and_back(names):
    state = optaccum.get_state(names["opt_state"])
    assert isinstance(state, optaccum.AccumulateState)
    assert optax.tree.get(names["back"], "acc_grads")["w"].shape == (3,)


def test_the_restored_state_lies_where_the_parameters_lie(names):
    restored = names["restored"]
    assert restored.grad_sum["w"].sharding.spec == jax.P("data")
    assert len(restored.mini_step.sharding.device_set) == jax.device_count()
    assert int(restored.mini_step) == 1


def test_equinox_trains_as_the_full_batch_does(names):
    assert int(optaccum.get_state(names["opt_state"]).gradient_step) == 1
    mse, x, y = (names[name] for name in ("mse", "x", "y"))
    loss, grads = eqx.filter_value_and_grad(mse)(names["model"], x, y)
    np.testing.assert_allclose(names["eqx_loss"], loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(names["eqx_grads"]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nnx_carries_its_statistics(names):
    assert np.isfinite(names["nnx_value"])
    assert float(jnp.abs(names["nnx_model"].norm.mean[...]).sum()) > 0


@pytest.mark.parametrize("step", ["apply_gradients", "update"])
@pytest.mark.parametrize("jit", [False, True])
def test_whole_modules_of_equinox(step, jit):
    """Functions among the leaves, and a last microbatch that releases."""
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = optaccum.accumulate(2, optax.adamw(0.1))
    state, batch = tx.init(eqx.filter(model, eqx.is_inexact_array)), jnp.ones((4, 2))

    def run(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(jax.vmap(model)(batch) ** 2))(model)
        if step == "apply_gradients":
            return optaccum.apply_gradients(tx, grads, state, model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    run = eqx.filter_jit(run) if jit else run
    before = model
    for _ in range(2):
        model, state = run(model, state)
    assert model.activation is before.activation
    moved = jnp.abs(model.layers[0].weight - before.layers[0].weight).max()
    assert float(moved) == pytest.approx(0.1, rel=0.1)


def test_a_whole_module_in_one_step_says_how_to_take_it_apart():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    step = optaccum.value_and_grad(lambda model, x: jnp.mean(x), num_microbatches=2)
    with pytest.raises(TypeError, match=r"argument 0\.activation is no array.*equinox\.partition"):
        step(model, jnp.ones((4, 2)))


# An old checkpoint in a new program: the messages that the page quotes.

PARAMS = {"w": jnp.ones(2)}
OLD = optax.MultiSteps(optax.adam(0.1), 4)
TX = optaccum.accumulate(4, optax.adam(0.1))


def _names(text):
    """Returns a message with the names in braces sorted: sets have no order."""
    return re.sub(r"\{(.*?)\}", lambda m: str(sorted(m[1].split(", "))), text)


def test_flax_says_what_the_page_quotes():
    template, state = TX.init(PARAMS), OLD.init(PARAMS)
    quoted = next(line for line in TEXT.splitlines() if line.startswith("ValueError: The field"))
    for restore in (
        lambda: serialization.from_bytes(template, serialization.to_bytes(state)),
        lambda: serialization.from_state_dict(template, serialization.to_state_dict(state)),
    ):
        with pytest.raises(ValueError, match="field names") as error:
            restore()
        assert _names(f"ValueError: {error.value}") == _names(quoted)


def test_a_dict_says_what_the_page_quotes():
    data = serialization.msgpack_serialize(serialization.to_state_dict(OLD.init(PARAMS)))
    restored = serialization.msgpack_restore(data)
    with pytest.raises(TypeError) as error:
        TX.update(PARAMS, restored, PARAMS)
    assert f"TypeError: {error.value}" in TEXT
    old = serialization.from_state_dict(OLD.init(PARAMS), restored)
    assert optaccum.from_multi_steps(TX, old, PARAMS).mini_step == 0


def test_orbax_says_what_the_page_quotes(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", OLD.init(PARAMS))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="do not match") as error:
            checkpointer.restore(tmp_path / "old", TX.init(PARAMS))
        first, second, third, *_, last = str(error.value).strip().splitlines()
        quoted = "\n".join([f"ValueError: {first}", second, third, "...", last])
        assert quoted in TEXT
        old = checkpointer.restore(tmp_path / "old", OLD.init(PARAMS))
    assert optaccum.from_multi_steps(TX, old, PARAMS).mini_step == 0


def test_a_template_on_one_device_says_what_the_page_quotes(names):
    params = jax.device_put(PARAMS, jax.NamedSharding(names["mesh"], jax.P()))
    one = jax.device_put(TX.init(PARAMS), jax.devices()[0])
    with pytest.raises(ValueError, match="incompatible devices for jitted") as error:
        jax.jit(lambda s, p: TX.update(p, s, p))(one, params)
    assert f"ValueError: {str(error.value).split('. Got')[0]}" in TEXT


class Scaled(eqx.Module):
    """A module with Python numbers among its leaves."""

    w: jax.Array
    scale: float = 2.0
    centred: bool = True

    def __call__(self, x):
        return self.scale * (x @ self.w) - (1.0 if self.centred else 0.0)


@pytest.mark.parametrize("k", [1, 2])
def test_settings_of_a_module_stay_what_they_are(k):
    model, tx = Scaled(jnp.ones(3)), optaccum.accumulate(k, optax.sgd(0.01))
    state, batch = tx.init(eqx.filter(model, eqx.is_inexact_array)), jnp.ones((4, 3))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(model(batch) ** 2))(model)
        return optaccum.apply_gradients(tx, grads, state, model)

    for _ in range(2 * k):
        model, state = step(model, state)
    assert (model.scale, model.centred) == (2.0, True)
    assert (type(model.scale), type(model.centred)) == (float, bool)
    assert optaccum.has_released(state)
    assert not jnp.allclose(model.w, 1.0)

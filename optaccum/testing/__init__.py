"""Does this program accumulate right, and if not, why not?

`check_loss` compares a loss on microbatches with the loss on the full batch. `check_step` compares
whole training steps, optimizer included. Use them in tests, on a small model and a few rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

from optaccum import _call
from optaccum.testing import loss as _loss, step as _step
from optaccum.testing.report import Finding, Report
from optaccum.testing.runs import Program as _Program

__all__ = ("Finding", "Report", "assert_equivalent", "check_loss", "check_step")


def check_loss(
    fun: Callable[..., Any],
    *args: Any,
    kwargs: dict[str, Any] | None = None,
    num_microbatches: int | None = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    has_aux: bool = False,
    weight_fn: Callable[..., Any] | None = None,
    rng_argnums: int | Sequence[int] = (),
    tolerance: float | None = None,
) -> Report:
    """Say whether microbatches give the gradient that `fun` has on the full batch, and why not.

    The numbers give the verdict. They compare the full batch's gradient g with the mean of the
    microbatches' gradients g_i, and with :func:`optaccum.value_and_grad`. If the mean differs, they
    look for factors a_i with g = sum_i a_i g_i at several values of the parameters, and for leaves
    of the batch that count so. All that has to fit in several orders of the rows. The structure
    explains: it follows the rows through the program to the source line that makes one value of
    several rows, and finds what of the program can be cut.

    >>> import jax.numpy as jnp
    >>> from optaccum.testing import check_loss
    >>> def loss_fn(params, batch):
    ...     losses = batch["mask"] * (batch["x"] @ params) ** 2
    ...     return jnp.sum(losses) / jnp.sum(batch["mask"])
    >>> batch = {"x": jnp.arange(8.0).reshape(4, 2), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
    >>> report = check_loss(loss_fn, jnp.array([1.0, -2.0]), batch, num_microbatches=2)
    >>> print(report.exact, report.kind, report.weights.round(3))
    False weights [0.667 0.333]
    >>> right = lambda params, batch: batch["mask"].sum()
    >>> check_loss(loss_fn, jnp.ones(2), batch, num_microbatches=2, weight_fn=right).exact
    True

    Guarantees:
        * The structure takes two traces of `fun`. Without `num_microbatches` nothing is compiled.
        * Only bad arguments raise. A program that cannot be followed or run is "unknown".
        * Arrays stay on their devices: with arguments sharded as in training, the check sees what
          the compilers do there.
        * Weights, a factor, `microbatched` and what can be computed before the batch is cut are
          advised after they were tried: `left` is the error with them. It is None if the program
          cannot be taken apart, or if nothing helps, as for BatchNorm inside the model.
        * A loss in low precision is judged in float32, if its operations can be had in it.
        * If `exact` is True, `findings` are lines that may couple rows that differ more.
        * Microbatch i holds the rows i, i + n, ..., as in :func:`optaccum.value_and_grad`.

    ==================  ========================================================================
    kind                what it says of the loss, or of a line
    ==================  ========================================================================
    "coupled"           rows are coupled: no weights give the full batch
    "weights"           other weights do: `weights` has them, the detail their source
    "factor"            one factor does, `scale`: a sum against a mean
    "terms"             it adds terms that are divided by different counts
    "stochastic"        rows draw random numbers; `exact` is None
    "not_finite"        gradients of microbatches are not finite; `exact` is None
    "compiler"          it is right, but the compiled loop over the microbatches is not
    "unknown"           not understood, or perhaps rounding; `exact` is None
    "pairwise"          (a line) a value for every pair of rows
    "batch_statistic"   (a line) a sum over rows flows back into the rows
    "nonlinear"         (a line) a nonlinear function of a sum over rows
    "order"             (a line) rows are sorted, cumulated or taken by their position
    "divisor"           (a line) a division by a count of the data
    "row_count"         (a line) a function of the number of rows other than a power
    ==================  ========================================================================

    Args:
        fun: A function that returns a real scalar, or with `has_aux` `(scalar, aux)`.
        *args: Its arguments, arrays and not shapes. Take a few rows that differ in what they hold.
        kwargs: Its keyword arguments.
        num_microbatches: N >= 2, which divides the rows; None for the structure alone.
        argnums: What is differentiated.
        batch_argnums: Positions of the pytrees that are split; None for the argument 1.
        batch_argnames: Names of the keyword arguments that are split. With None, no keyword
            argument may have as many rows as the batch; pass () to give it to each microbatch.
        has_aux: Whether `fun` returns `(scalar, aux)`.
        weight_fn: The weights that you use, as in :func:`optaccum.value_and_grad`.
        rng_argnums: Positions of keys. All microbatches get them as they are.
        tolerance: The relative error that is still exact; None to derive it from the dtypes and
            the number of roundings.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, as :func:`optaccum.value_and_grad`.
    """
    roles = _call.check_roles(
        batch_argnames, argnums=argnums, batch_argnums=batch_argnums, rng_argnums=rng_argnums
    )
    kwargs = {} if kwargs is None else kwargs
    return _loss.check(fun, args, kwargs, num_microbatches, roles, has_aux, weight_fn, tolerance)


def assert_equivalent(fun: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Raise AssertionError with the report's text unless :func:`check_loss` says exact.

    Args:
        fun: As in :func:`check_loss`.
        *args: Its arguments.
        **options: The keyword arguments of :func:`check_loss`.

    Raises:
        AssertionError: if `exact` is False or None.
        TypeError, ValueError: as :func:`check_loss`.
    """
    report = check_loss(fun, *args, **options)
    if report.exact is not True:
        raise AssertionError(str(report))


def check_step(
    make_step: Callable[[Any, int], tuple[Any, Callable[[Any, Any], Any]]],
    params: Any,
    batch: Any,
    *,
    every_k: int,
    inside_step: bool = False,
    get_params: Callable[[Any], Any] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Say whether a training step does with `every_k` microbatches what it does with the batch.

    `make_step(params, 1)` makes the step that is right. Three of its steps on the full batch are
    compared with three windows of `make_step(params, every_k)`. If they differ, further runs tell
    which mistake it is.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate
    >>> from optaccum.testing import check_step
    >>> def make_step(params, every_k):
    ...     tx = optax.chain(accumulate(every_k), optax.adam(0.1))
    ...     def step(state, x):
    ...         params, opt_state = state
    ...         grads = jax.grad(lambda params: jnp.mean((x @ params - 1) ** 2))(params)
    ...         updates, opt_state = tx.update(grads, opt_state, params)
    ...         return optax.apply_updates(params, updates), opt_state
    ...     return (params, tx.init(params)), step
    >>> report = check_step(make_step, jnp.ones(2), jnp.arange(8.0).reshape(4, 2), every_k=2)
    >>> print(report.exact, report.kind)
    False optimizer

    With `flax.training.train_state`, the state is the train state::

        def make_step(params, every_k):
            tx = optax.MultiSteps(optax.adam(1e-3), every_k)
            return TrainState.create(apply_fn=model.apply, params=params, tx=tx), train_step

    With `flax.nnx`, `params` is the module. Each run gets a copy, which the step changes in place::

        def make_step(model, every_k):
            optimizer = nnx.Optimizer(model, accumulate(every_k, optax.adam(1e-3)), wrt=nnx.Param)
            return (model, optimizer), lambda state, rows: train_step(*state, rows)

    ==================  ========================================================================
    kind                the mistake
    ==================  ========================================================================
    "optimizer"         the optimizer is outside the accumulation: it acts in calls that hold
    "schedule"          a schedule counts microbatches
    "ema"               an average of the parameters takes in every microbatch
    "state"             something else that the loss reads moves in every microbatch
    "clip"              each microbatch's gradient is clipped, not their mean
    "divided_twice"     the loss or gradient is divided by `every_k`, and the window's mean again
    "factor"            another factor: gradients are summed
    "weights"           microbatches differ in what they count
    "batch_norm"        BatchNorm's statistics are those of microbatches
    "coupled"           rows are coupled otherwise
    "dropout_keys"      all microbatches draw with one key
    "stochastic"        microbatches draw with different keys; `exact` is None
    "donated"           the step reads or donates what it donated; `exact` is None
    "unknown"           not understood, or perhaps rounding; `exact` is None
    ==================  ========================================================================

    Guarantees:
        * `params` and `batch` are copied for every run: the step may donate its arguments.
        * What moves beside the parameters is named after it was tried, with what the full batch has
          of it: `left` is the error with that.
        * Only bad arguments raise. A step that raises is "unknown", with its error in the detail.

    Args:
        make_step: `(params, every_k) -> (state, step)`. `step(state, rows)` takes in the rows of a
            microbatch and returns the new state, or a tuple with it, or None if it changes the
            state in place.
        params: What training begins with: a pytree, or a module of `flax.nnx`.
        batch: A pytree whose leaves have the rows of the full batch, which `every_k` divides.
        every_k: Microbatches per window, >= 2. Microbatch i holds the rows i, i + k, ...
        inside_step: Whether `step` takes the full batch and divides it itself.
        get_params: `state -> parameters`; None for what has the tree of `params`, or of its
            "params". Of several, it is what is called "params" or moves the most.
        tolerance: The relative error that is still exact; None to derive it from how far a step
            moves the parameters.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """
    program = _Program(make_step, params, every_k, inside_step, get_params)
    return _step.check(program, batch, tolerance)

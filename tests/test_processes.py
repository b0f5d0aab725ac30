"""Real processes train like one, go on as one, and do not wait for the dead."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from helpers import parts_program, scripts
from helpers.meshes import DEVICES
import jax
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.slow

for requirement in ("flax", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(requirement)
pytest.importorskip("orbax.checkpoint")
scripts.free_address()  # or skip this module

MULTIHOST = scripts.REPOSITORY / "examples" / "multihost.py"
STEPS, EVERY_K = 3, 4
LAST = STEPS * EVERY_K
COMMAND = [sys.executable, "-W", "error", str(MULTIHOST), f"--every-k={EVERY_K}"]
# Eight devices' parts of a gradient are summed in another order: at most 8 roundings of 2**-24 of
# their sizes, here below 0.1. Where the gradient itself is tiny, AdamW with eps 1e-6 makes of that
# a difference of rounding / eps of its step, 3e-3. (Seen: 1e-7; training moves parameters by 6e-3.)
TOLERANCE = STEPS * 3e-3 * (8 * 2**-24 * 0.1) / 1e-6


@pytest.fixture(scope="module")
def multihost():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MULTIHOST.parent)
        return scripts.load(MULTIHOST)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoints of a run of two processes, and what it prints."""
    folder = tmp_path_factory.mktemp("multihost")
    printed = scripts.run(*COMMAND, f"--steps={STEPS}", "--save-every=5", cwd=folder)
    return folder / "multihost-checkpoints", printed


def make_args(**options):
    settings = {"steps": STEPS, "every_k": EVERY_K}
    return argparse.Namespace(**settings, settings=settings, save_every=100, **options)


def difference(a, b):
    """Returns the largest difference of a parameter."""
    leaves = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in leaves)


def test_two_processes_train_like_one(finished):
    rows = re.findall(r"(?m)^ *(\w.*?)  +([\d.]+)  +[\d.]+% *(\S*) *$", finished[1])
    (many, loss, distance), (alone, expected, _) = rows
    assert many == "2 processes, 8 devices"
    assert alone == "the same, alone"
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert float(distance) < TOLERANCE


def test_one_process_goes_on_in_mid_window_where_two_were(multihost, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "checkpoints")
    args = make_args(checkpoints=folder)
    job = multihost.make_job(args)
    with multihost.open_checkpoints(folder) as checkpoints:
        assert [checkpoint.step for checkpoint in checkpoints.checkpoints] == [10, LAST]
        two = jax.tree.map(np.asarray, checkpoints.load(LAST, job.initial))
        saved = jax.tree.map(np.asarray, checkpoints.load(10, job.initial))
    assert int(saved.opt_state.mini_step) == 10 % EVERY_K
    assert int(saved.opt_state.gradient_step) == 10 // EVERY_K
    shutil.rmtree(folder / str(LAST))
    with multihost.open_checkpoints(folder) as checkpoints:
        one = multihost.train(job, args, checkpoints)
    assert int(one.opt_state.gradient_step) == STEPS
    assert float(one.opt_state.weight) == 256
    assert difference(one, saved) > TOLERANCE > difference(one, two)


def test_a_checkpoint_of_another_run_is_refused(multihost, finished):
    args = make_args(checkpoints=finished[0])
    args.settings = {**args.settings, "steps": 9}
    job = multihost.make_job(args)
    refusal = pytest.raises(ValueError, match=r"argument --resume: .*'steps': 3.*'steps': 9")
    with multihost.open_checkpoints(finished[0]) as checkpoints, refusal:
        multihost.train(job, args, checkpoints)


def test_microbatches_hold_the_window_and_their_padding_counts_nothing(multihost):
    job = multihost.make_job(make_args())
    window = [multihost.read_microbatch(job, number, EVERY_K) for number in range(4, 8)]
    sizes = [int(mask.sum()) for *_, mask in window]
    assert sum(sizes) == 256
    assert len(set(sizes)) == EVERY_K
    rows = [np.asarray(x)[np.asarray(mask)].reshape(-1, 64) for x, _, mask in window]
    drawn = np.random.default_rng(1).permutation(len(job.data[0]))[:256]
    np.testing.assert_array_equal(np.concatenate(rows), job.data[0][drawn].reshape(-1, 64))


@pytest.fixture
def endless(tmp_path):
    """A run under way: the launcher, and the numbers of its two processes."""
    launcher = subprocess.Popen(
        [*COMMAND, "--steps=100000", "--save-every=10"],
        cwd=tmp_path,
        env=scripts.ENVIRONMENT,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert launcher.stdout is not None
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", launcher.stdout.readline())]
        assert len(pids) == 2
        while not (tmp_path / "multihost-checkpoints" / "10").exists():
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        yield launcher, pids
    finally:
        for _ in range(2):  # the second one does not wait
            launcher.terminate()
        launcher.communicate(timeout=90)


def test_a_killed_process_ends_the_others_and_is_named(endless):
    launcher, pids = endless
    os.kill(pids[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=25)  # sooner than a heartbeat is missed
    assert launcher.returncode == 1
    assert "'process 1' died with <Signals.SIGKILL: 9>" in errors.splitlines()[-1]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_signal_saves_where_all_processes_agree(endless, tmp_path):
    launcher, _ = endless
    launcher.send_signal(signal.SIGINT)
    printed, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 130, errors
    (done,) = re.findall(r"Saved after microbatch (\d+)", printed)
    saved = [int(path.name) for path in (tmp_path / "multihost-checkpoints").iterdir()]
    assert max(saved) == int(done)


def test_processes_that_were_started_differently_all_stop(tmp_path):
    """Else the one would wait for the other, in a step that it does not take."""
    address = scripts.free_address()
    workers = [
        subprocess.Popen(
            [*COMMAND, "--steps=1000", f"--every-k={5 + i}", "--worker", address, "2", str(i)],
            cwd=tmp_path,
            env=scripts.ENVIRONMENT,
            encoding="utf-8",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=90)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert all(worker.returncode for worker in workers), errors
    # One may die of the other's end before it has printed its own error.
    message = "differ in --steps, --every-k, --save-every: [[1000, 5, 50], [1000, 6, 50]]"
    assert any(message in error for error in errors), errors
    assert not any(tmp_path.rglob("[0-9]*")), "trained and saved"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--processes", "0"),
        ("--devices-per-process", "-1"),
        ("--steps", "0"),
        ("--every-k", "257"),
        ("--save-every", "0"),
        ("--checkpoints", "."),
        ("--resume", None),
    ],
)
def test_what_cannot_work_is_refused(multihost, tmp_path, monkeypatch, capsys, option, value):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["multihost.py", option, *([value] if value else [])])
    with pytest.raises(SystemExit) as exit_:
        multihost.parse_args()
    assert exit_.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


# Parts of sums on the devices of two real processes are those of one process.


def one_batch_a_window():
    """Returns the parameters after the windows as full batches, without what is rejected."""
    batches = [
        (x, mask)
        for i, (x, mask) in enumerate(zip(parts_program.X, parts_program.MASK, strict=True))
        if i != parts_program.REJECTED
    ]
    inner = optax.adam(0.1, eps=1e-2)
    params = {"w": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "b": np.zeros(4, "f")}
    state = inner.init(params)
    for start in (0, parts_program.EVERY_K):
        window = batches[start : start + parts_program.EVERY_K]
        x, mask = (np.concatenate(arrays) for arrays in zip(*window, strict=True))
        grads = jax.grad(parts_program.loss_fn)(params, x, mask)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_two_processes_end_with_what_one_has(tmp_path):
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    address = scripts.free_address()
    flags = f"--xla_force_host_platform_device_count={DEVICES // 2}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(scripts.REPOSITORY)}
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", parts_program.__name__, address, "2", str(i), file],
            cwd=scripts.REPOSITORY / "tests",
            env=environment,
            encoding="utf-8",
            stdout=subprocess.DEVNULL,  # gloo reports to it
            stderr=subprocess.PIPE,
        )
        for i, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), errors
    first, second = (dict(np.load(file)) for file in files)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    alone = parts_program.train(jax.devices()[:DEVICES])
    counters = "mini_step", "gradient_step", "skipped", "released"
    for counted in (first, alone):
        assert [int(counted[name]) for name in counters] == [1, 2, 1, 0]
    for name, expected in one_batch_a_window().items():
        # Sums in another order, in steps of 0.1 that are divided by |g| + 1e-2.
        np.testing.assert_allclose(first[name], alone[name], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(first[name], expected, rtol=2e-5, atol=2e-5)

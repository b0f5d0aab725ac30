"""Train the CNN of digits.py in many processes: on this machine, a SLURM cluster or a TPU pod.

Without `--distributed` this program starts the processes, with CPU devices. Each process feeds
different rows of every microbatch, and all devices share the work. Then one process with as many
devices trains again, and the results are compared. If a process dies, the others stop too. Training
saves checkpoints. Ctrl-C and SIGTERM save one more and exit with 130 and 143. `--resume` goes on
from the last checkpoint, even in mid-window, with any number of processes.

With `--distributed` a cluster starts the processes, and jax connects them. On SLURM run
`srun python examples/multihost.py --distributed`, with one task for each node or GPU. On a TPU pod
run `python examples/multihost.py --distributed` on every host (`gcloud compute tpus tpu-vm
ssh NAME --worker=all --command=...`). There `--checkpoints` is a folder that all processes see.
"""

import argparse
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any, NamedTuple

from digits import BATCH_SIZE, CNN
from flax import nnx
import jax
from jax.experimental.multihost_utils import process_allgather, reached_preemption_sync_point
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaccum

HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as dead
SAVING_SECONDS = 60  # to save and exit after a signal


class State(NamedTuple):
    params: Any
    opt_state: Any


class Job(NamedTuple):
    """What a process needs to train. The arrays of a `State` are replicated over all devices."""

    data: Any
    rows: jax.NamedSharding
    initial: State
    train_step: Any
    count_correct: Any


def make_job(args: argparse.Namespace) -> Job:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    data = train_test_split(images, labels.astype(np.int32), test_size=0.2, random_state=0)
    # Sorted, so that the rows of one process lie together.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = jax.sharding.Mesh(np.array(devices), "data")
    replicated = jax.NamedSharding(mesh, jax.P())
    # With Adam's usual 1e-8, a gradient that is only a rounding error would make a whole step.
    inner = optax.adamw(optax.cosine_decay_schedule(3e-3, decay_steps=args.steps), eps=1e-6)
    tx = optaccum.accumulate(args.every_k, inner, average_args=("value",))
    model = nnx.graphdef(nnx.eval_shape(lambda: CNN(nnx.Rngs(0))))

    def init():
        params = nnx.state(CNN(nnx.Rngs(0)), nnx.Param)
        return State(params, tx.init(params))

    def loss_fn(params, images, labels, mask):
        logits = nnx.merge(model, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(where=mask)

    def train_step(state, images, labels, mask):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels, mask)
        # Means and sums are over the rows of all processes, so the weight is the number of real
        # examples in the whole microbatch, whichever process has the padding.
        params, opt_state = optaccum.apply_gradients(
            tx, grads, state.opt_state, state.params, weight=mask.sum(), value=loss
        )
        return State(params, opt_state)

    def count_correct(params, images, labels):
        return (nnx.merge(model, params)(images).argmax(axis=-1) == labels).sum()

    return Job(
        data=data,
        rows=jax.NamedSharding(mesh, jax.P("data")),
        initial=jax.jit(init, out_shardings=replicated)(),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=replicated),
        count_correct=jax.jit(count_correct, out_shardings=replicated),
    )


def read_microbatch(job: Job, number: int, every_k: int) -> list[jax.Array]:
    """Return images, labels and mask. This process reads only the rows of its devices.

    A microbatch depends only on its number, so that a resumed run reads on. Microbatches are
    ragged, and padded to one size that can be sharded over the devices.
    """
    window, i = divmod(number, every_k)
    images, _, labels, _ = job.data
    drawn = np.random.default_rng(window).permutation(len(images))[:BATCH_SIZE]
    cuts = (BATCH_SIZE - every_k) * np.linspace(0, 1, every_k + 1) ** 1.5
    ends = np.round(cuts).astype(int) + np.arange(every_k + 1)
    devices = jax.device_count()
    size = -(-np.diff(ends).max() // devices) * devices
    local = size // devices * jax.local_device_count()
    mine = ends[i] + jax.process_index() * local + np.arange(local)
    mask = mine < ends[i + 1]
    rows = drawn[np.where(mask, mine, 0)]
    return [
        jax.make_array_from_process_local_data(job.rows, x, (size, *x.shape[1:]))
        for x in (images[rows], labels[rows], mask)
    ]


def open_checkpoints(folder: Path) -> ocp.training.Checkpointer:
    keep: Any = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(str(folder.resolve()), preservation_policy=keep)


def train(job: Job, args: argparse.Namespace, checkpoints: Any = None) -> State:
    """Train from the last checkpoint, if any, to the end, and save on the way."""
    state, start, last = job.initial, 0, args.steps * args.every_k
    if checkpoints and checkpoints.latest:
        start = checkpoints.latest.step
        found = checkpoints.metadata(checkpoints.latest).custom_metadata
        if found != args.settings:
            message = f"argument --resume: the checkpoint is of a run of {found}"
            raise ValueError(f"{message}, not {args.settings}")
        state = checkpoints.load(start, state)
    processes, devices = jax.process_count(), jax.device_count()
    with Progress(disable=jax.process_index() > 0) as progress:
        task = progress.add_task(name_run(processes, devices), total=last, completed=start)
        for done in range(start + 1, last + 1):
            state = job.train_step(state, *read_microbatch(job, done - 1, args.every_k))
            jax.block_until_ready(state)  # a dead process shows here, not in a save
            progress.update(task, advance=1)
            # jax takes SIGTERM as a notice, and all processes agree on the step to stop at.
            stop = jax.distributed.is_initialized() and reached_preemption_sync_point(done)
            if checkpoints and (stop or done % args.save_every == 0 or done == last):
                checkpoints.save(done, state, force=True, custom_metadata=args.settings)
            if stop:
                progress.console.print(f"Saved after microbatch {done}; go on with --resume.")
                sys.exit(128 + signal.SIGTERM)
    return state


def name_run(processes: int, devices: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}, {devices} devices"


def print_table(job: Job, results: dict[str, State]) -> None:
    """Print a row for each result in process 0. All processes must compute it."""
    table = Table("", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for header in ("loss", "accuracy", "max |Δp|"):
        table.add_column(header, justify="right", no_wrap=True)
    _, images, _, labels = job.data
    *_, exact = results.values()
    for name, (params, opt_state) in results.items():
        window = optaccum.get_state(opt_state)
        loss = float(window.arg_sums["sum_of_value"]) / float(window.weight)
        accuracy = int(job.count_correct(params, images, labels)) / len(labels)
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(exact.params), strict=True)
        distance = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in leaves)
        compared = f"{distance:.2g}" if params is not exact.params else ""
        table.add_row(name, f"{loss:.6f}", f"{accuracy:.1%}", compared)
    Console(quiet=jax.process_index() > 0).print(table)


def compare(args: argparse.Namespace) -> None:
    """Train again in this one process, without `jax.distributed`, and print both results."""
    job = make_job(args)
    with open_checkpoints(args.checkpoints) as checkpoints:
        many = checkpoints.load(args.steps * args.every_k, job.initial)
    name = name_run(args.processes, args.processes * args.devices_per_process)
    print_table(job, {name: many, "the same, alone": train(job, args)})


def work(args: argparse.Namespace) -> None:
    """Do one process's part of the training."""
    given = process_allgather(np.array([args.steps, args.every_k, args.save_every]))
    if (given != given[0]).any():  # the processes would wait for each other forever
        raise ValueError(f"processes differ in --steps, --every-k, --save-every: {given.tolist()}")
    job = make_job(args)
    with open_checkpoints(args.checkpoints) as checkpoints:
        state = train(job, args, checkpoints)
    if args.distributed:
        print_table(job, {name_run(jax.process_count(), jax.device_count()): state})


def join(args: argparse.Namespace) -> None:
    """Join the other processes and train. Fail in a way that the others notice."""
    where: dict[str, Any] = {}
    if args.worker:
        address, processes, number = args.worker
        where = {"num_processes": int(processes), "process_id": int(number)}
        # Without the bind address, the coordinator would listen on all interfaces.
        where |= {"coordinator_address": address, "coordinator_bind_address": address}
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    try:
        work(args)
    except Exception:
        # At a normal exit jax waits for the other processes, which wait for this one.
        traceback.print_exc()
        os._exit(1)


def launch(processes: int, devices: int, *options: str) -> None:
    """Run the job in processes with `devices` each. When one fails, end the others and exit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, __file__, *sys.argv[1:], *options, "--worker", address]
    caught, deadline = [], float("inf")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    # In a new session a process does not get the terminal's Ctrl-C, only the signal sent below.
    kept: Any = {"env": environment, "start_new_session": True}
    children = [subprocess.Popen([*command, str(processes), "0"], **kept)]
    for i in range(1, processes):  # quiet: gloo reports to stdout
        kept["stdout"] = subprocess.DEVNULL
        children.append(subprocess.Popen([*command, str(processes), str(i)], **kept))
    try:
        pids = ", ".join(f"{i} (pid {child.pid})" for i, child in enumerate(children))
        print(f"Started process {pids}", flush=True)
        while None in (codes := [child.poll() for child in children]):
            if (any(codes) and not caught) or len(caught) > 1 or time.monotonic() > deadline:
                break
            if caught and deadline == float("inf"):
                deadline = time.monotonic() + SAVING_SECONDS
                for child in children:
                    child.terminate()
            time.sleep(0.02)
    finally:
        for child in children:
            child.kill()  # jax takes SIGTERM as a notice, and may wait for the dead process
            child.wait()
    if caught:
        sys.exit(128 + caught[0])
    died = [(code, f"process {i}") for i, code in enumerate(codes) if code]
    if died:
        sys.exit("error: " + " ".join(str(subprocess.CalledProcessError(*each)) for each in died))


def parse_args() -> argparse.Namespace:
    """Parse the command line, and raise errors before any process is started."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="to start on this machine; 2")
    add("--devices-per-process", type=int, default=4, help="CPU devices of each of them; 4")
    add("--distributed", action="store_true", help="be one process of a cluster; start none")
    add("--steps", type=int, default=50, help="gradient steps; 50")
    add("--every-k", type=int, default=4, help=f"microbatches per step, at most {BATCH_SIZE}; 4")
    add("--save-every", type=int, default=50, help="microbatches per checkpoint; 50")
    folder = Path("multihost-checkpoints")
    add("--checkpoints", type=Path, default=folder, help=f"where to keep them; {folder}")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--worker", nargs=3, help=argparse.SUPPRESS)  # address, number of processes, number of this
    add("--compare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("processes", "devices_per_process", "steps", "every_k", "save_every"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be >= 1, got {value}")
    if args.every_k > BATCH_SIZE:
        parser.error(f"argument --every-k: must be <= {BATCH_SIZE}, got {args.every_k}")
    args.settings = {"steps": args.steps, "every_k": args.every_k}  # resume with the same
    holds = args.checkpoints.is_dir() and any(args.checkpoints.iterdir())
    if args.worker is None and holds != args.resume:
        what = "holds a run; delete or --resume" if holds else "holds no checkpoint"
        option = "--checkpoints" if holds else "--resume"
        parser.error(f"argument {option}: {args.checkpoints} {what}")
    return args


if __name__ == "__main__":
    args = parse_args()
    # Accelerators may round float32 products coarsely, and differently for each batch size.
    with jax.default_matmul_precision("highest"):
        if args.compare:
            compare(args)
        elif args.worker or args.distributed:
            join(args)
        else:
            launch(args.processes, args.devices_per_process)
            launch(1, args.processes * args.devices_per_process, "--compare")

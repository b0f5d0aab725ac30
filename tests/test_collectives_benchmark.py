"""The benchmark of collectives counts what programs run; deferred ways reduce once per window."""

import os
import pathlib
import subprocess
import sys

from helpers.benchmarks import quick_run
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import collectives, hlo

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
K, DEVICES, LOCAL_BYTES = 4, 8, 2 * 3 * 4
HAS_RESHARD = hasattr(jax, "reshard")
EXPLICIT = ("optaccum.apply_gradients, explicit", "optaccum.value_and_grad, explicit")
# Parameters that a window reduces, and that a hold does, in their size.
REDUCED = {
    "full batch": (1, None),
    "optax.MultiSteps": (K, 1),
    "optaccum.apply_gradients": (K, 1),
    "optaccum.apply_gradients, shard_map": (1, 0),
    **(dict.fromkeys(EXPLICIT, (1, 0)) if HAS_RESHARD else {}),
    "optaccum.value_and_grad": (K, 1),
    "optaccum.value_and_grad, shard_map": (1, 0),
    "hand-written, shard_map": (1, 0),
}


def sizes(found, size):
    """Returns how many parameter sizes are reduced, and how many bytes beside them."""
    assert {one["kind"] for one in found} <= {"all-reduce"}
    large = [one for one in found if one["bytes"] >= 1e-3 * size]
    small = [one for one in found if one not in large]
    # A token count may travel with the gradients.
    return pytest.approx(collectives.total(large) / size, rel=1e-4), small


@pytest.mark.slow
def test_quick_run_counts_one_reduction_a_window_where_it_is_deferred():
    result, printed = quick_run("collectives", "--every-k", str(K))
    assert (result["benchmark"], result["reference"]) == ("collectives", "full batch")
    assert result["devices"] == DEVICES
    rows = {row["name"]: row for row in result["contenders"]}
    assert {name: row["agrees"] for name, row in rows.items()} == dict.fromkeys(REDUCED, True)
    assert set(result["left_out"]) == (set() if HAS_RESHARD else set(EXPLICIT))
    for name, (window, hold) in REDUCED.items():
        reduced, small = sizes(rows[name]["window"], result["parameter_bytes"])
        assert reduced == window, name
        assert all(one["bytes"] <= 12 for one in small), name
        if hold is None:
            assert rows[name]["hold"] is None
        else:
            assert sizes(rows[name]["hold"], result["parameter_bytes"])[0] == hold, name
    nothing = {name for name, row in rows.items() if row["hold"] == []}
    assert nothing == {name for name in REDUCED if name.endswith("shard_map")}
    assert rows["optax.MultiSteps"]["time_to_multi_steps"]["median"] == 1
    assert rows["hand-written, shard_map"]["time_to_hand_written"]["median"] == 1
    lengths = {(row["name"], row["every_k"]): row["bytes"] for row in result["by_every_k"]}
    for name in ("optaccum.apply_gradients, shard_map", "optaccum.value_and_grad, shard_map"):
        assert lengths[name, 4] == lengths[name, 16]
    assert lengths["optax.MultiSteps", 16] == 4 * lengths["optax.MultiSteps", 4]
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert all(name in printed for name in REDUCED)
    assert ("Left out" in printed) != HAS_RESHARD


def add_up(x):
    return lax.psum(jnp.sin(x), "data")


def in_scan(x):
    return lax.scan(lambda c, i: (add_up(x * c[0, 0]) + i, None), x, jnp.arange(16.0))[0]


def in_branch(x):
    return lax.cond(x[0, 0] > 3, add_up, jnp.cos, x)


def in_branch_of_scan(x):
    return lax.scan(lambda c, _: (in_branch(in_scan(c)), None), x, length=5)[0]


def in_unbounded_loop(x):
    return lax.while_loop(lambda c: c[0, 0] < 3, add_up, x)


def in_condition(x):
    return lax.while_loop(lambda c: lax.psum(c[0, 0], "data") < 3, lambda c: c + 1, x)


def of_every_kind(x):
    rows = jnp.tile(jnp.sin(x), (DEVICES, 1))
    spread = lax.psum_scatter(rows, "data", tiled=True)
    swapped = lax.all_to_all(jnp.cos(rows), "data", 0, 0, tiled=True)
    ring = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
    gathered = lax.all_gather(jnp.tan(x), "data")
    return spread + swapped[:2] + lax.ppermute(x, "data", ring) + gathered.sum(0)


def merged(x):
    # Scalars in enough number that the text of the program numbers its operands.
    return sum(lax.psum([jnp.sin(x), *(x[0, 0] + i for i in range(7))], "data"))


def found_in(function):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((16, 3))).compile().as_text()
    assert text is not None
    found = hlo.collectives(text)
    return sorted((one.kind, one.bytes, one.trips, one.conditional) for one in found)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jnp.sin, []),
        (add_up, [("all-reduce", LOCAL_BYTES, 1, False)]),
        (in_scan, [("all-reduce", LOCAL_BYTES, 16, False)]),
        (in_branch, [("all-reduce", LOCAL_BYTES, 1, True)]),
        (
            in_branch_of_scan,
            [("all-reduce", LOCAL_BYTES, 5 * 16, False), ("all-reduce", LOCAL_BYTES, 5, True)],
        ),
        (
            of_every_kind,
            [
                ("reduce-scatter", DEVICES * LOCAL_BYTES, 1, False),
                ("all-to-all", DEVICES * LOCAL_BYTES, 1, False),
                ("collective-permute", LOCAL_BYTES, 1, False),
                ("all-gather", LOCAL_BYTES, 1, False),
            ],
        ),
        (merged, [("all-reduce", LOCAL_BYTES + 7 * 4, 1, False)]),
        # A loop without known trips is a step, which not every call takes; its condition is asked.
        (in_unbounded_loop, [("all-reduce", LOCAL_BYTES, 1, True)]),
        (in_condition, [("all-reduce", 4, 1, False)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_collectives_of_a_program(function, expected):
    assert found_in(function) == sorted(expected)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.collectives("module @jit_f {}")


def test_collectives_that_start_and_end_apart_are_counted_once():
    """As on an accelerator, which also says shapes of operands, and layouts with parentheses."""
    text = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scatter (p: bf16[64]) -> bf16[8] {
  %p = bf16[64]{0:T(256)(128)} parameter(0)
  ROOT %rs = bf16[8]{0} reduce-scatter(%p), dimensions={0}, to_apply=%sum
}

ENTRY %main (x: bf16[64], y: f32[4,2]) -> bf16[8] {
  %x = bf16[64]{0:T(256)(128)} parameter(0)
  %y = f32[4,2]{1,0} parameter(1)
  %s = ((bf16[64]), bf16[8], u32[]) async-start(bf16[64]{0:T(256)(128)} %x), calls=%scatter
  %g = (f32[4,2]{1,0}, f32[32,2]{1,0}) all-gather-start(f32[4,2]{1,0} %y), dimensions={0}
  %h = f32[32,2]{1,0} all-gather-done((f32[4,2]{1,0}, f32[32,2]{1,0}) %g)
  ROOT %d = bf16[8]{0} async-done(((bf16[64]), bf16[8], u32[]) %s), calls=%scatter
}
"""
    found = [(one.kind, one.bytes, one.trips) for one in hlo.collectives(text)]
    assert found == [("reduce-scatter", 128, 1), ("all-gather", 32, 1)]


def test_the_loop_of_a_tpu_has_the_trips_that_its_condition_counts_to_and_what_it_keeps_is_free():
    text = """HloModule m

%condition (c: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(16)
  %c = (s32[], f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[4]{0} get-tuple-element(%b), index=1
  %near = f32[4]{0:T(128)S(1)} negate(%x)
  %sum = f32[4]{0} all-reduce(%near), to_apply=%add
  ROOT %next = (s32[], f32[4]{0}) tuple(%j, %sum)
}

%step (s: f32[4]) -> f32[4] {
  %s = f32[4]{0} parameter(0)
  ROOT %copied = f32[4]{0} copy(%s)
}

%hold (h: f32[4]) -> f32[4] {
  ROOT %h = f32[4]{0} parameter(0)
}

ENTRY %main (p: pred[], start: (s32[], f32[4])) -> f32[4] {
  %p = pred[] parameter(0)
  %start = (s32[], f32[4]{0}) parameter(1)
  %w = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  %y = f32[4]{0} get-tuple-element(%w), index=1
  ROOT %r = f32[4]{0} conditional(%p, %y, %y), branch_computations={%hold, %step}
}
"""
    assert hlo.collectives(text) == [hlo.Collective("all-reduce", 16, 16, False)]
    # Each trip negates (reads 16 bytes, keeps 16 on the chip) and reduces (writes 16); the
    # condition reads two numbers and writes a truth value; the step reads and writes 16 bytes.
    moved = hlo.moved(text)
    assert (moved.hold, moved.release) == (16 * 32 + 9, 16 * 32 + 9 + 32)
    assert moved.kernels_of_release == moved.kernels_of_hold + 1 == 16 * 2 + 2


def test_the_fused_collectives_of_a_tpu_are_named_and_counted_once():
    """One goes on from fusion to fusion, with its channel; a reduce-scatter has another name."""
    fusion = """
%part.{i} (p: f32[8]) -> f32[64] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %g = f32[64]{{0}} all-gather(%p), channel_id=7, dimensions={{0}}
}}
"""
    text = f"""HloModule m
{fusion.format(i=1)}{fusion.format(i=2)}
%all-reduce-scatter.3 (q: f32[64]) -> f32[8] {{
  %q = f32[64]{{0}} parameter(0)
  %r = f32[64]{{0}} all-reduce(%q), channel_id=8, to_apply=%add
  ROOT %d = f32[8]{{0}} dynamic-slice(%r), dynamic_slice_sizes={{8}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %a = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%part.1
  %b = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%part.2
  ROOT %c = f32[8]{{0}} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}}
"""
    found = [(one.kind, one.bytes) for one in hlo.collectives(text)]
    assert found == [("all-gather", 32), ("reduce-scatter", 256)]


def test_a_release_counts_once_a_window_and_a_scan_once_a_microbatch():
    class Program:
        def __init__(self, *found):
            self.found = found

        def as_text(self):
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hlo, "collectives", lambda program: list(program.found))
        one = hlo.Collective("all-reduce", 100, 1, False)
        release = hlo.Collective("all-reduce", 900, 1, True)
        window, hold = collectives.traffic([Program(one, release)] * 3, 3)
        assert hold == [{"kind": "all-reduce", "bytes": 100, "times": 1}]
        assert window == [{"kind": "all-reduce", "bytes": 900, "times": 1}, hold[0] | {"times": 3}]
        window, hold = collectives.traffic([Program(hlo.Collective("all-gather", 5, 3, False))], 3)
        assert hold == [{"kind": "all-gather", "bytes": 5, "times": 1}]
        assert window == [hold[0] | {"times": 3}]


def test_a_single_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="needs at least 2 devices, found 1 cpu"):
        next(collectives.measure(None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ({}, DEVICES),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
        ({"JAX_NUM_CPU_DEVICES": "5"}, 5),
    ],
)
def test_a_cpu_becomes_several_devices_or_what_was_asked_for(given, devices):
    program = "; ".join(
        [
            "import jax",
            "from benchmarks import collectives",
            "collectives.make_cpu_devices()",
            "print(jax.device_count())",
        ]
    )
    others = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env=others | given, text=True
    )
    assert int(found) == devices

"""The reader of compiled programs counts what is known by hand."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from benchmarks import hlo

DEVICES, LOCAL_BYTES = 8, 2 * 3 * 4


IN_PLACE = """HloModule m

%add_row (p0: f32[8,4], p1: f32[4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %flat = f32[32]{0} bitcast(%p0)
  %old = f32[1,4]{1,0} dynamic-slice(%p0, %p2, %zero), dynamic_slice_sizes={1,4}
  %row = f32[1,4]{1,0} bitcast(%p1)
  %new = f32[1,4]{1,0} add(%old, %row)
  ROOT %updated = f32[8,4]{1,0} dynamic-update-slice(%p0, %new, %p2, %zero)
}

%condition (c: (s32[], f32[8,4], f32[4])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  %n = s32[] constant(8)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[8,4], f32[4])) -> (s32[], f32[8,4], f32[4]) {
  %b = (s32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %sums = f32[8,4]{1,0} get-tuple-element(%b), index=1
  %g = f32[4]{0} get-tuple-element(%b), index=2
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  %next = f32[8,4]{1,0} fusion(%sums, %g, %j), kind=kLoop, calls=%add_row
  ROOT %r = (s32[], f32[8,4]{1,0}, f32[4]{0}) tuple(%k, %next, %g)
}

ENTRY %main (start: (s32[], f32[8,4], f32[4])) -> (s32[], f32[8,4], f32[4]) {
  %start = (s32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[8,4]{1,0}, f32[4]{0}) while(%start), condition=%condition, body=%body
}
"""


def test_an_update_in_place_counts_with_its_slice():
    """Each of 8 trips reads a row of the sums, a row and an index, and writes a row."""
    counting = 9 + 8 * 12  # the condition once; in each trip two numbers are read, one written
    assert hlo.moved(IN_PLACE).hold == 8 * (16 + 16 + 4 + 16) + counting


def test_a_fusion_that_reads_the_whole_array_counts_it():
    """Each trip adds all 128 bytes of the old sums, in place of a row, to that row."""
    whole = IN_PLACE.replace("add(%old, %row)", "add(%old, %flat)")
    assert hlo.moved(whole).hold - hlo.moved(IN_PLACE).hold == 8 * (128 - 16 - 16)


def test_slices_outside_a_fusion_and_a_fusion_with_two_results():
    text = """HloModule m

%two (a: f32[8,4], i: s32[]) -> (f32[32], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[2,4]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={2,4}
  %new = f32[8,4]{1,0} dynamic-update-slice(%a, %part, %i, %zero)
  %flat = f32[32]{0} bitcast(%new)
  %all = f32[8,4]{1,0} broadcast(%i), dimensions={}
  ROOT %both = (f32[32]{0}, f32[8,4]{1,0}) tuple(%flat, %all)
}

ENTRY %main (x: f32[8,4], n: s32[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %o = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%x, %n, %o), dynamic_slice_sizes={1,4}
  %y = f32[8,4]{1,0} dynamic-update-slice(%x, %row, %n, %o)
  %t = (f32[32]{0}, f32[8,4]{1,0}) fusion(%y, %n), kind=kLoop, calls=%two
  ROOT %z = f32[8,4]{1,0} get-tuple-element(%t), index=1
}
"""
    # A row is read and written; a row is read and written. The fusion reads two rows and an index,
    # and writes two rows in place, and 8 others.
    assert hlo.moved(text).release == 2 * 16 + 2 * 16 + (32 + 4) + (32 + 128)


FORGETS = """HloModule m

%keep (who: u32[], carry: f32[4]) -> f32[4] {
  %who = u32[] parameter(0)
  %carry = f32[4]{0} parameter(1)
  %first = u32[] constant(0)
  %is_first = pred[] compare(%who, %first), direction=EQ
  %mask = pred[4]{0} broadcast(%is_first), dimensions={}
  %zero = f32[] constant(0)
  %zeros = f32[4]{0} broadcast(%zero), dimensions={}
  ROOT %kept = f32[4]{0} select(%mask, %carry, %zeros)
}

%condition (c: (s32[], f32[4], u32[])) -> pred[] {
  %c = (s32[], f32[4]{0}, u32[]) parameter(0)
  ROOT %more = pred[] constant(true)
}

%body (b: (s32[], f32[4], u32[])) -> (s32[], f32[4], u32[]) {
  %b = (s32[], f32[4]{0}, u32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %sum = f32[4]{0} get-tuple-element(%b), index=1
  %me = u32[] get-tuple-element(%b), index=2
  %mine = f32[4]{0} fusion(%me, %sum), kind=kLoop, calls=%keep
  %next = f32[4]{0} add(%mine, %mine)
  ROOT %r = (s32[], f32[4]{0}, u32[]) tuple(%i, %next, %me)
}

ENTRY %main (n: s32[], s: f32[4]) -> (s32[], f32[4], u32[]) {
  %n = s32[] parameter(0)
  %s = f32[4]{0} parameter(1)
  %id = u32[] partition-id()
  %start = (s32[], f32[4]{0}, u32[]) tuple(%n, %s, %id)
  ROOT %w = (s32[], f32[4]{0}, u32[]) while(%start), condition=%condition, body=%body
}
"""


def test_a_carry_that_all_devices_but_one_set_to_zero_is_found():
    assert hlo.forgotten(FORGETS) == ["f32[4]{0}"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("add(%mine, %mine)", "all-reduce(%mine), to_apply=%add"),  # it is reduced in the loop
        ("u32[] partition-id()", "u32[] constant(1)"),  # all devices choose alike
        ("constant(0)\n  %zeros", "constant(1)\n  %zeros"),  # it is not zero
        ("tuple(%i, %next, %me)", "tuple(%i, %sum, %me)"),  # nothing of it is carried on
    ],
)
def test_a_carry_that_is_not_forgotten(before, after):
    assert FORGETS.count(before) == 1
    assert hlo.forgotten(FORGETS.replace(before, after)) == []


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


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=1,'c'=4] {'c'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", 4),
        ("mesh['a'=8] {'a'}", 8),
        ("{}", None),
    ],
)
def test_a_collective_says_between_how_many_devices_it_runs(groups, size):
    text = f"""HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum
}}
"""
    (found,) = hlo.collectives(text)
    assert (found.group, found.bytes) == (size, 16)


def test_a_reduction_is_hidden_if_a_product_runs_between_its_start_and_its_end():
    text = """HloModule m

ENTRY %main (x: f32[4], y: f32[4,4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[4,4]{1,0} parameter(1)
  %s = f32[4]{0} all-reduce-start(%x), to_apply=%sum
  %g = f32[4]{0} custom-call(%y, %x), custom_call_target="__cublas$gemm"
  %d = f32[4]{0} all-reduce-done(%s)
  %t = f32[4]{0} all-reduce-start(%g), to_apply=%sum
  %e = f32[4]{0} all-reduce-done(%t)
  ROOT %r = f32[4]{0} add(%d, %e)
}
"""
    assert hlo.hidden(text) == (1, 2)


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
    assert hlo.moved(text) == hlo.Moved(16 * 32 + 9, 16 * 32 + 9 + 32)


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

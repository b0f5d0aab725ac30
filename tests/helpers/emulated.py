"""Programs that the compilers of chips have partitioned, run on CPU devices.

A compiler that is asked to dump its program after a pass writes one for each device, in which
collectives are instructions. Such a program runs inside `jax.shard_map` on as many CPU devices, and
so shows what chips would compute. It takes modules of jaxlib that are not public.
"""

import pathlib
import re
import tempfile
from typing import Any

import jax
from jax import P
from jax._src.interpreters.mlir import merge_mlir_modules
from jax._src.lib.mlir.dialects import func
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir
import numpy as np

# After this pass no reduction is moved any more.
PASS = "while-loop-all-reduce-code-motion"


def compile_and_run(lowered: Any, *args: Any) -> tuple[Any, Any]:
    """Compiles a program for chips; returns it, and the results of its first device.

    Args:
        lowered: of a jitted function, for devices of chips.
        *args: its arguments, NumPy arrays, all of which the program reads.
    """
    from jaxlib import _hlo, _jax  # the lowest supported version has them elsewhere

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": PASS,
            "xla_dump_large_constants": True,
        }
        compiled = lowered.compile(compiler_options=options)
        *_, last = sorted(pathlib.Path(folder).glob(f"*after_{PASS}*"))
        text = re.sub(r", sharding=\{(?:[^{}]|\{[^{}]*\})*\}", "", last.read_text())
    text = re.sub(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", _groups, text
    )
    module = _hlo.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    shardings = jax.tree.leaves(compiled.input_shardings[0])
    devices = list(shardings[0].mesh.devices.flat)
    parts = [
        np.stack([x[sharding.devices_indices_map(x.shape)[device]] for device in devices])
        for x, sharding in zip(jax.tree.leaves(args), shardings, strict=True)
    ]
    shapes = [
        jax.core.ShapedArray(sharding.shard_shape(x.shape), x.dtype)
        for x, sharding in zip(
            jax.tree.leaves(lowered.out_info),
            jax.tree.leaves(compiled.output_shardings),
            strict=True,
        )
    ]
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[: len(devices)]), ("all",))
    program = _jax.mlir.hlo_to_stablehlo(module)

    def on_one(*own):
        results = _run_p.bind(*(x[0] for x in own), program=program, shapes=tuple(shapes))
        return [x[None] for x in results]

    on_all = jax.shard_map(
        on_one, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False
    )
    results = [np.asarray(x)[0] for x in jax.jit(on_all)(*parts)]
    return compiled, jax.tree.structure(lowered.out_info).unflatten(results)


def _groups(found: re.Match) -> str:
    """Returns the groups of a collective as lists of devices, for those that name mesh axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    inside = re.findall(r"'(\w+)'", found[2])
    order = [name for name in sizes if name not in inside] + inside
    ids = np.arange(int(np.prod([*sizes.values()]))).reshape(*sizes.values())
    ids = ids.transpose([[*sizes].index(name) for name in order])
    rows = ids.reshape(-1, int(np.prod([sizes[name] for name in inside])))
    return f"replica_groups={{{','.join('{' + ','.join(map(str, row)) + '}' for row in rows)}}}"


def _lower(context: mlir.LoweringRuleContext, *args: Any, program: bytes, shapes: tuple) -> Any:
    into = context.module_context
    with into.context:
        module = ir.Module.parse(program)
    name = merge_mlir_modules(into.module, "emulated", module, dst_symtab=into.symbol_table)
    types = [ir.RankedTensorType.get(x.shape, mlir.dtype_to_ir_type(x.dtype)) for x in shapes]
    return func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(args)).results


_run_p = Primitive("emulated")
_run_p.multiple_results = True
_run_p.def_abstract_eval(lambda *_, shapes, **__: list(shapes))
mlir.register_lowering(_run_p, _lower)

"""What is shown of the figures of `benchmarks.collectives`, and what they would be at scale."""

import dataclasses
import itertools
from typing import Any


def total(found: list[dict[str, Any]]) -> int:
    """Returns the bytes of all collectives in a list of {kind, bytes, times}."""
    return sum(one["bytes"] * one["times"] for one in found)


def setting(result: dict[str, Any]) -> str:
    """Returns what was trained."""
    window = f"{result['every_k']} x {result['devices']} x {result['microbatch']} sequences"
    return (
        f"{result['parameters'] / 1e6:,.1f} M parameters, float32, {result['devices']} devices, "
        f"a window of {window} of {result['sequence']} tokens"
    )


def collectives_cell(found: list[dict[str, Any]] | None, parameter_bytes: int) -> str:
    """Returns how often collectives run, times their mean size in that of the parameters.

    Those below a thousandth of it come apart, in bytes. An all-reduce goes without saying.
    """
    if not found:
        return "-" if found is None else "none"
    cells = []
    for kind in dict.fromkeys(one["kind"] for one in found):
        ours = [one for one in found if one["kind"] == kind]
        large = [one for one in ours if one["bytes"] >= 1e-3 * parameter_bytes]
        small = [one for one in ours if one not in large]
        name = "" if kind == "all-reduce" else f"{kind} "
        for group, unit, size in ((large, parameter_bytes, "{:.2f}"), (small, 1, "{:.0f} B")):
            if times := sum(one["times"] for one in group):
                cells.append(f"{name}{times} x {size.format(total(group) / times / unit)}")
    return " + ".join(cells)


def traffic_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns what each contender's devices send in a window, and in a hold."""
    size = result["parameter_bytes"]
    return [
        {
            "contender": row["name"],
            "all-reduces a window": collectives_cell(row["window"], size),
            "in a hold": collectives_cell(row["hold"], size),
        }
        for row in result["contenders"]
    ]


def time_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns each contender's time."""
    return [
        {
            "contender": row["name"],
            "window ms": f"{row['window_ms']['median']:,.0f}",
            "to MultiSteps": f"{row['time_to_multi_steps']['median']:.2f}",
            "to hand-written": f"{row['time_to_hand_written']['median']:.2f}",
            "agrees": "yes" if row["agrees"] else "NO",
        }
        for row in result["contenders"]
    ]


def length_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the sizes of the parameters that are reduced in a window, by its length."""
    rows = itertools.groupby(result["by_every_k"], key=lambda row: row["name"])
    return [
        {"contender": name}
        | {f"k = {row['every_k']}": f"{row['bytes'] / result['parameter_bytes']:.2f}" for row in of}
        for name, of in rows
    ]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What `at_scale` assumes.

    Attributes:
        chips: that share the rows of a microbatch, each with all parameters.
        parameters: of the model.
        every_k: microbatches a window.
        tokens: of one chip in one microbatch.
        peak: operations per second of a chip.
        utilization: share of the peak that training reaches.
        bandwidths: bytes per second that a chip sends during a reduction, a slow and a fast case.
    """

    chips: int = 1024
    parameters: float = 7e9
    every_k: int = 16
    tokens: int = 2048
    peak: float = 1e15
    utilization: float = 0.4
    bandwidths: tuple[float, ...] = (100e9, 400e9)

    def __str__(self) -> str:
        free = " (float32: ".join(f"{self.free_bandwidth(b) / 1e9:,.0f}" for b in (2, 4))
        return (
            f"Calculated, not measured. Assumed: {self.chips:,} chips, each with all of "
            f"{self.parameters / 1e9:g} B parameters; k = {self.every_k} microbatches of "
            f"{self.tokens:,} tokens a chip, so {self.window_tokens / 1e6:,.1f} M a window; "
            f"{self.utilization:.0%} of {self.peak / 1e12:,.0f} TFLOP/s, where attention's own "
            "products and rematerialization are not counted. Then a microbatch computes for "
            f"{self.compute_seconds:.3f} s, and its reduction fits into its backward pass from "
            f"{free}) GB/s on. Beside the sums a chip holds {12 * self.parameters / 1e9:,.0f} GB "
            "of float32 parameters and AdamW's moments, and gradients and activations."
        )

    @property
    def window_tokens(self) -> int:
        """Tokens of all chips in a window."""
        return self.chips * self.every_k * self.tokens

    @property
    def compute_seconds(self) -> float:
        """Time of one microbatch's forward and backward pass: 6 N T / (peak x utilization)."""
        return 6 * self.parameters * self.tokens / (self.peak * self.utilization)

    @property
    def backward_seconds(self) -> float:
        """Time of its backward pass alone."""
        return 2 / 3 * self.compute_seconds

    def scatter_bytes(self, bytes_each: int) -> float:
        """Bytes that a chip sends to reduce-scatter, or to gather, all parameters in a ring."""
        return (self.chips - 1) / self.chips * self.parameters * bytes_each

    def reduce_bytes(self, bytes_each: int) -> float:
        """Bytes that a chip sends to all-reduce them: to scatter and to gather."""
        return 2 * self.scatter_bytes(bytes_each)

    def free_bandwidth(self, bytes_each: int) -> float:
        """Bytes per second at which an all-reduce takes no longer than a backward pass."""
        return self.reduce_bytes(bytes_each) / self.backward_seconds


def at_scale(scale: Scale) -> list[dict[str, Any]]:
    """Returns what reducing in each microbatch and once a window would cost: nothing is measured.

    Each microbatch's reduction could run during its backward pass. That of a window begins after
    the last one, and so does the gathering of what was scattered: nothing hides them.
    """
    sums = 4 * scale.parameters
    # For each way: bytes sent in a microbatch, bytes sent in a release, bytes of a chip's sums.
    ways = {
        "each microbatch, float32": (scale.reduce_bytes(4), 0.0, sums),
        "each microbatch, bfloat16": (scale.reduce_bytes(2), 0.0, sums),
        "each microbatch, bfloat16, scattered (ZeRO-2)": (
            scale.scatter_bytes(2),
            scale.scatter_bytes(4),
            sums / scale.chips,
        ),
        "once a window, float32": (0.0, scale.reduce_bytes(4), sums),
    }
    return [
        {
            "name": name,
            "sent_bytes": scale.every_k * each + once,
            "sum_bytes": held,
            "seconds": [(scale.every_k * each + once) / b for b in scale.bandwidths],
            "left_seconds": [
                scale.every_k * max(0.0, each / b - scale.backward_seconds) + once / b
                for b in scale.bandwidths
            ],
        }
        for name, (each, once, held) in ways.items()
    ]


def scale_rows(scale: Scale) -> list[dict[str, str]]:
    """Returns the figures of `at_scale` as cells."""
    return [
        {
            "reduction": row["name"],
            "sums on a chip": f"{row['sum_bytes'] / 1e9:,.3g} GB",
            "a chip sends": f"{row['sent_bytes'] / 1e9:,.0f} GB",
        }
        | {
            f"at {bandwidth / 1e9:,.0f} GB/s (not hidden)": f"{seconds:.2f} s ({left:.2f} s)"
            for bandwidth, seconds, left in zip(
                scale.bandwidths, row["seconds"], row["left_seconds"], strict=True
            )
        }
        for row in at_scale(scale)
    ]

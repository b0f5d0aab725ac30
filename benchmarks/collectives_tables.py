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

    Those below a thousandth of it are counted apart, in bytes. An all-reduce goes without saying.
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
            "in all": f"{total(row['window']) / size:.2f}",
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
        bandwidth: bytes per second that a chip sends during a reduction.
    """

    chips: int = 1024
    parameters: float = 7e9
    every_k: int = 16
    tokens: int = 2048
    peak: float = 1e15
    utilization: float = 0.4
    bandwidth: float = 100e9

    def __str__(self) -> str:
        return (
            f"Calculated, not measured. Assumed: {self.chips:,} chips, each with all of "
            f"{self.parameters / 1e9:g} B parameters; k = {self.every_k} microbatches of "
            f"{self.tokens:,} tokens a chip, so {self.window_tokens / 1e6:,.1f} M a window; "
            f"{self.utilization:.0%} of {self.peak / 1e12:,.0f} TFLOP/s; a chip sends "
            f"{self.bandwidth / 1e9:,.0f} GB/s while it reduces. Then a microbatch computes for "
            f"{self.compute_seconds:.3f} s; float32 sums take {4 * self.parameters / 1e9:,.0f} GB "
            f"of each chip, beside {12 * self.parameters / 1e9:,.0f} GB of parameters and AdamW's "
            f"moments; and from {self.hiding_tokens(2):,.0f} tokens on (float32: "
            f"{self.hiding_tokens(4):,.0f}) a reduction fits into its own backward pass."
        )

    @property
    def window_tokens(self) -> int:
        """Tokens of all chips in a window."""
        return self.chips * self.every_k * self.tokens

    @property
    def compute_seconds(self) -> float:
        """Time of one microbatch's forward and backward pass: 6 N T / (peak x utilization)."""
        return 6 * self.parameters * self.tokens / (self.peak * self.utilization)

    def sent_bytes(self, bytes_each: int) -> float:
        """Bytes that a chip sends for one ring all-reduce of all gradients: 2 (n - 1) / n of it."""
        return 2 * (self.chips - 1) / self.chips * self.parameters * bytes_each

    def hiding_tokens(self, bytes_each: int) -> float:
        """Tokens of a chip in a microbatch whose backward pass is as long as one reduction."""
        seconds = self.sent_bytes(bytes_each) / self.bandwidth
        return seconds * self.peak * self.utilization / (4 * self.parameters)


def at_scale(scale: Scale) -> list[dict[str, Any]]:
    """Returns what reducing in each microbatch and once a window would cost: nothing is measured.

    Each microbatch's reduction could run during its backward pass, which is two thirds of its
    time; that of a window begins after the last one, and nothing hides it.
    """
    ways = {
        "each microbatch, bfloat16": (scale.every_k, 2),
        "each microbatch, float32": (scale.every_k, 4),
        "once a window, float32": (1, 4),
    }
    computing = scale.every_k * scale.compute_seconds
    rows = []
    for name, (times, size) in ways.items():
        seconds = scale.sent_bytes(size) / scale.bandwidth
        hidden = min(seconds, 2 / 3 * scale.compute_seconds) if times > 1 else 0.0
        rows.append(
            {
                "name": name,
                "sent_bytes": times * scale.sent_bytes(size),
                "seconds": times * seconds,
                "share": times * seconds / (times * seconds + computing),
                "left_seconds": times * (seconds - hidden),
            }
        )
    return rows


def scale_rows(scale: Scale) -> list[dict[str, str]]:
    """Returns the figures of `at_scale` as cells."""
    return [
        {
            "reduction": row["name"],
            "a chip sends": f"{row['sent_bytes'] / 1e9:,.0f} GB",
            "takes": f"{row['seconds']:.2f} s",
            "of the window, nothing hidden": f"{row['share']:.0%}",
            "left, hidden as far as can be": f"{row['left_seconds']:.2f} s",
        }
        for row in at_scale(scale)
    ]

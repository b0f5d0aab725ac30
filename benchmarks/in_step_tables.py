"""What is shown of the figures of `benchmarks.in_step`, as rows of cells by heading."""

from typing import Any

AGREES = {None: "did not run", True: "yes", False: "NO"}


def _ratio(figure: dict[str, float] | None) -> str:
    return f"{figure['median']:.2f}" if figure else "-"


def step_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns what each contender's step costs: ratios, and megabytes of its compiled program."""
    return [
        {
            "contender": row["name"],
            "time to scan": _ratio(row["time_to_hand_written"]),
            "to optax": _ratio(row["time_to_microbatch"]),
            "to full batch": _ratio(row["time_to_full_batch"]),
            "compile to scan": _ratio(row["compile_to_hand_written"]),
            "temp. MB": f"{row['temporary_bytes'] / 1e6:,.1f}",
            "peak MB": f"{row['peak_bytes'] / 1e6:,.1f}",
            "agrees": AGREES[row["agrees"]],
        }
        for row in result["contenders"]
    ]


def largest_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the largest batch that fits the budget."""
    return [
        {
            "contender": row["name"],
            "sequences a microbatch": "all"
            if row["microbatch"] is None
            else str(row["microbatch"]),
            f"batch that fits {result['budget_bytes'] / 1e6:,.0f} MB": (
                f"{'at least ' if row['capped'] else ''}{row['batch']:,}"
            ),
        }
        for row in result["largest"]
    ]


def drift_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Returns how far the gradients of a bfloat16 model are from their exact mean."""
    return [
        {"contender": row["name"], "largest relative error": f"{row['relative_error']:.1e}"}
        for row in result["drift"]
    ]

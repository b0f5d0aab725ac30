"""Write the tables of the README from the committed results, so that no number is typed."""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def overhead_table(result: dict[str, Any]) -> str:
    """Returns the figures of `benchmarks.overhead` as a Markdown table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "| | window, to MultiSteps | to the hand-written loop | temporaries | trace and compile |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["contenders"]:
        ratios = [row[f"ratio_to_{name}"]["median"] for name in ("multi_steps", "hand_written")]
        lines.append(
            f"| {row['name']} | {ratios[0]:.2f} | {ratios[1]:.2f} | {row['temporaries']:.1f} "
            f"| {row['compile_s']:.1f} s |"
        )
    where = f"{result['device']}, {versions}, {result['date'][:10]}"
    return "\n".join([*lines, "", f"Measured on: {where}."])


def insert(text: str, name: str, table: str) -> str:
    """Returns `text` with `table` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrites the README's tables."""
    result = json.loads((RESULTS / "overhead-cpu.json").read_text())
    README.write_text(insert(README.read_text(), "overhead", overhead_table(result)))


if __name__ == "__main__":
    main()

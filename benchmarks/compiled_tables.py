"""What is shown of the figures of `benchmarks.compiled`."""

from typing import Any

from benchmarks.tables import NOT_EQUIVALENT, Table, median, name_of

TARGETS = {"h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e", "cpu": "CPU"}
BYTES = "P: the size of the parameters. Counted in the compiled programs; nothing ran."
REDUCED = 0.005  # what is less of P is not shown as an array


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns all tables by name."""
    named = {
        "compiled": overview(result),
        "compiled_windows": windows(result),
        "compiled_training": training(result),
        "compiled_traffic": traffic(result),
    }
    return {name: [table] for name, table in named.items() if table.rows}


def overview(result: dict[str, Any]) -> Table:
    """Returns, for AdamW, bytes and temporaries of each contender, target by target."""
    found = [row for row in result["optimizer"] if row["inner"] == "adamw"]
    chips = [chip for chip in TARGETS if any(row["target"] == chip for row in found)]

    def cells(name):
        rows = {row["target"]: row for row in found if row["name"] == name}
        temporaries = [
            median(rows[c]["temporaries"], "{:.2f}") if c in rows else "-" for c in chips
        ]
        return {
            "contender": name_of(next(iter(rows.values()))),
            **{TARGETS[chip]: _window(rows.get(chip)) for chip in chips},
            "temporaries": " / ".join(temporaries),
        }

    names = ", ".join(TARGETS[chip] for chip in chips)
    legend = f"AdamW: hold / release / window in P; temporaries in P for {names}."
    notes = [legend, NOT_EQUIVALENT, _setting(result, found)]
    rows = [cells(name) for name in dict.fromkeys(row["name"] for row in found)]
    return Table(rows, "Windows of AdamW", notes)


def windows(result: dict[str, Any]) -> Table:
    """Returns every figure of each window."""
    rows = [
        {
            "target": TARGETS[row["target"]],
            "inner": row["inner"],
            "contender": name_of(row),
            **{f"{part}, P": f"{row[part]:.2f}" for part in ("hold", "release", "window")},
            "release as reported": median(row["reported_release"]),
            "temporaries, P": f"{row['temporaries']:.2f}",
            "kernels": f"{row['kernels_of_hold']} / {row['kernels_of_release']}",
            "compile s": f"{row['compile_s']:.1f}",
        }
        for row in result["optimizer"]
    ]
    return Table(rows, "Windows", [NOT_EQUIVALENT, agreement(result), _setting(result, [])])


def training(result: dict[str, Any]) -> Table:
    """Returns what training steps move above their gradients, and their peak."""
    rows = [
        {
            "target": TARGETS[row["target"]],
            "contender": row["name"],
            **{
                f"{part}, P": median(row[part], "{:+.1f}") for part in ("hold", "release", "window")
            },
            "temporaries, P": f"{row['temporaries']:.2f}",
            "peak": f"{row['peak_bytes'] / 1e9:.2f} GB",
        }
        for row in result["training"]
    ]
    notes = []
    if rows:
        size = result["training"][0]["parameter_bytes"] / 4e6
        notes = [f"Transformer of {size:.1f} M parameters in bfloat16.", _setting(result, [])]
    return Table(rows, "Training: bytes above those of the gradients alone", notes)


def traffic(result: dict[str, Any]) -> Table:
    """Returns what devices send each other in a hold and in a window, target by target."""
    chips = dict.fromkeys(row["target"] for row in result["traffic"])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["traffic"]:
        key = row["model"], row["name"]
        cells = rows.setdefault(key, {"model": row["model"], "contender": row["name"]})
        for part in ("hold", "window"):
            cells[f"{TARGETS[row['target']]}: {part}"] = sent(row[part], row)
    headings = [f"{TARGETS[chip]}: {part}" for chip in chips for part in ("hold", "window")]
    full = [
        dict.fromkeys(("model", "contender", *headings), "-") | cells for cells in rows.values()
    ]
    return Table(
        full, "Eight devices: arrays that they reduce or gather, in P", [_setting(result, [])]
    )


def sent(found: list[dict[str, Any]] | None, row: dict[str, Any]) -> str:
    """Returns the size in P of the arrays that are reduced or gathered, by kind."""
    if not found:
        return "-" if found is None else "none"
    totals: dict[str, float] = {}
    for one in found:
        # What is gathered is as many times larger as there are devices that have a part of it.
        whole = row["devices"] if one["kind"] == "all-gather" else 1
        size = whole * one["bytes"] * one["times"] / row["parameter_bytes"]
        totals[one["kind"]] = totals.get(one["kind"], 0) + size
    cells = [f"{kind} {size:.2f}" for kind, size in totals.items() if size >= REDUCED]
    return ", ".join(cells) or "scalars"


def agreement(result: dict[str, Any]) -> str:
    """Returns how well the bytes agree with those that the compilers of TPUs report."""
    largest: dict[str, float] = {}
    for row in result["optimizer"]:
        if row["target"] in ("v5e", "v6e") and row["disagreement"] is not None:
            largest[row["inner"]] = max(largest.get(row["inner"], 0), row["disagreement"])
    if not largest:
        return "No compiler of a TPU was there to compare the bytes with."
    parts = ", ".join(f"{inner} {part:.1%}" for inner, part in largest.items())
    return (
        f"Bytes differ from those that the compilers of TPUs report by at most: {parts}. These "
        "count an operand of a product once for each side that it stands on."
    )


def _window(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return " / ".join(f"{row[part]:.3g}" for part in ("hold", "release", "window"))


def _setting(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    size = f" {rows[0]['parameter_bytes'] / 1e6:,.0f} MB of parameters." if rows else ""
    left_out = "".join(
        f" Left out: {TARGETS[target]}; `{remedy}`."
        for target, remedy in result["left_out"].items()
    )
    return f"k = {result['every_k']}.{size} {BYTES} {versions}, {result['date'][:10]}.{left_out}"

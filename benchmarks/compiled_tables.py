"""Tables of the figures of `benchmarks.compiled`."""

from typing import Any

from benchmarks.tables import NOT_EQUIVALENT, Table, median, name_of, three_digits

TARGETS = {"h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e", "cpu": "CPU"}
REDUCED = 0.005  # a smaller part of P is not shown as an array


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns all tables by name."""
    found = result["optimizer"]
    named = {
        "compiled": windows(result, [row for row in found if row["inner"] == "adamw"]),
        "compiled_others": windows(result, [row for row in found if row["inner"] != "adamw"]),
        "compiled_programs": kernels(result),
        "compiled_training": training(result),
        "compiled_traffic": traffic(result),
    }
    return {name: [table] for name, table in named.items() if table.rows}


def windows(result: dict[str, Any], found: list[dict[str, Any]]) -> Table:
    """Returns bytes and temporaries of each contender, target by target."""
    chips = [chip for chip in TARGETS if any(row["target"] == chip for row in found)]
    rows = {}
    for row in found:
        names = {"inner": row["inner"]} if row["inner"] != "adamw" else {}
        names["contender"] = name_of(row)
        empty = names | {TARGETS[chip]: "-" for chip in chips} | {"temporaries": ["-"] * len(chips)}
        cells = rows.setdefault(tuple(names.values()), empty)
        parts = (three_digits(row[part]) for part in ("hold", "release", "window"))
        cells[TARGETS[row["target"]]] = " / ".join(parts)
        cells["temporaries"][chips.index(row["target"])] = f"{row['temporaries']:.2f}"
    cells = [row | {"temporaries": " / ".join(row["temporaries"])} for row in rows.values()]
    sizes = dict.fromkeys(f"{row['inner']} {row['parameter_bytes'] / 1e6:,.0f} MB" for row in found)
    order = ", ".join(TARGETS[chip] for chip in chips)
    legend = f"Cells: bytes of a hold / a release / a window; temporaries for {order}. All are in "
    legend += "sizes of the parameters, P."
    notes = [legend, NOT_EQUIVALENT, f"Parameters: {', '.join(sizes)}. {_setting(result)}"]
    return Table(cells, "Windows", notes)


def kernels(result: dict[str, Any]) -> Table:
    """Returns kernels of a hold and a release of AdamW, and the time to compile a window."""
    rows: dict[str, dict[str, str]] = {}
    found = [row for row in result["optimizer"] if row["inner"] == "adamw"]
    for row in sorted(found, key=lambda row: list(TARGETS).index(row["target"])):
        cells = rows.setdefault(row["name"], {"contender": name_of(row)})
        counts = f"{row['kernels_of_hold']} / {row['kernels_of_release']}"
        cells[f"{TARGETS[row['target']]}: kernels"] = counts
        cells[f"{TARGETS[row['target']]}: compile"] = f"{row['compile_s']:.1f} s"
    return Table(list(rows.values()), "Programs of AdamW", [agreement(result), _setting(result)])


def training(result: dict[str, Any]) -> Table:
    """Returns what training steps move above their gradients, and their peak."""
    rows = [
        {"target": TARGETS[row["target"]], "contender": row["name"]}
        | {f"{part}, P": median(row[part], "{:+.1f}") for part in ("hold", "release", "window")}
        | {"temporaries, P": f"{row['temporaries']:.2f}"}
        | {"peak": f"{row['peak_bytes'] / 1e9:.2f} GB"}
        for row in result["training"]
    ]
    sizes = {row["parameter_bytes"] / 4e6 for row in result["training"]}
    notes = [f"Transformer of {size:.1f} M parameters in bfloat16." for size in sizes]
    title = "Training: bytes above those of the gradients alone"
    return Table(rows, title, [*notes, _setting(result)])


def traffic(result: dict[str, Any]) -> Table:
    """Returns what devices send each other in a hold and in a window, target by target."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["traffic"]:
        names = {"model": row["model"], "contender": row["name"]}
        cells = rows.setdefault((row["model"], row["name"]), names)
        for part in ("hold", "window"):
            cells[f"{TARGETS[row['target']]}: {part}"] = sent(row[part], row)
    title = "Eight devices: arrays that they reduce or gather, in P"
    return Table(list(rows.values()), title, [_setting(result)])


def sent(found: list[dict[str, Any]] | None, row: dict[str, Any]) -> str:
    """Returns the size in P of the arrays that are reduced or gathered, by kind."""
    if not found:
        return "-" if found is None else "none"
    totals: dict[str, float] = {}
    for one in found:
        # An array that is gathered is as many times larger as there are devices with a part of it.
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


def _setting(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    remedies = result["left_out"].items()
    left_out = "".join(f" Left out: {TARGETS[chip]}; `{remedy}`." for chip, remedy in remedies)
    return f"k = {result['every_k']}. Compiled with {versions}, {result['date'][:10]}.{left_out}"

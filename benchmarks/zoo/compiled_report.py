"""The table of compiled models: one row for each way of compiling, and one for each model."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from benchmarks.report import table

Found = dict[str, Any]

EXACT, EXACT_IN_FLOAT32 = 1e-10, 1e-5
"""The error that a row may have; the second where the model itself computes in float32."""

EXPLANATION = (
    "Three epochs of batches of 5, 5 and 3 samples. Breaks and compiled regions: as torch counts "
    "them, for both batch sizes together, before and after a model is left alone. Error: the "
    "largest one of weights and gradients in all steps, against a loop of plain autograd in "
    "float64; * where the model itself computes in float32.\n"
)

FUSED, NOTHING, LEFT = "fused between the layers", "nothing compiled", "left uncompiled"

COLUMNS = (
    "backend", "compiled", "models", "compile plainly", "exact", "fused", "nothing compiled",
    "left uncompiled", "over 2 more breaks a layer", "anew in epoch 3",
    "at torch's limit (plainly)",
)  # fmt: skip


def as_markdown(rows: list[Found]) -> str:
    """A row for each model, backend and order."""
    columns = ("model", "compiled", "layers", "breaks, regions: plain", "ours", "error", "way")
    return table(columns, map(_row, rows), [True] * len(columns)) + "\n" + EXPLANATION


def summary(rows: list[Found]) -> str:
    """A row for each backend and order."""
    groups = [_counts(key, list(group)) for key, group in groupby(rows, _way)]
    return table(COLUMNS, groups, [True] * len(COLUMNS))


def is_exact(row: Found) -> bool:
    """Whether every step equals the loop's."""
    bound = EXACT_IN_FLOAT32 if row.get("float32") else EXACT
    return "fails" not in _part(row, "ours") and row["ours"]["error"] <= bound


def way_of(row: Found) -> str:
    """What torch.compile is left with."""
    ours = _part(row, "ours")
    if "fails" in ours:
        return f"fails: {ours['fails'][:80]}"
    if ours["left_uncompiled"]:
        return LEFT
    whole = row["order"] == "after"  # the first step compiles all in one, and is alone with it
    return FUSED if ours["graphs"] > whole else NOTHING


def _part(row: Found, what: str) -> Found:
    return row.get(what) or {"fails": row.get("fails", "not measured")}


def _way(row: Found) -> tuple[str, str]:
    return row["backend"], row["order"]


def _counts(key: tuple[str, str], rows: list[Found]) -> list[str]:
    plain, ours = ([_part(row, what) for row in rows] for what in ("plain", "ours"))
    ways = [way_of(row) for row in rows]
    added = [o.get("breaks", 0) - p.get("breaks", 0) for o, p in zip(ours, plain, strict=True)]
    limits = [sum(part.get("limits", 0) > 0 for part in parts) for parts in (ours, plain)]
    numbers = [
        len(rows),
        sum("fails" not in part for part in plain),
        sum(map(is_exact, rows)),
        *map(ways.count, (FUSED, NOTHING, LEFT)),
        sum(n > 2 * row.get("layers", 0) for n, row in zip(added, rows, strict=True)),
        sum(part.get("compiled_in_epochs", [0])[-1] > 0 for part in ours),
    ]
    return [*key, *map(str, numbers), f"{limits[0]} ({limits[1]})"]


def _row(row: Found) -> list[str]:
    counts = [
        "" if "fails" in part else f"{part['breaks']}, {part['graphs']}"
        for part in (_part(row, "plain"), _part(row, "ours"))
    ]
    error = _part(row, "ours").get("error")
    text = "" if error is None else f"{error:.0e}" + "*" * row.get("float32", False)
    layers = str(row.get("layers", ""))
    return [row["name"], ", ".join(_way(row)), layers, *counts, text, way_of(row)]

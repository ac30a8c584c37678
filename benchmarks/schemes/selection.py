"""Which number, seen without groups, ranks models as the worst group's accuracy does?

    python -m benchmarks.schemes.selection

Reads the runs that `benchmarks.schemes.choosing` has left in benchmarks/results, all of one data
set together: Spearman's rank correlation over the runs between the true worst-group accuracy on one
half of the test split and what is visible on the other half.
"""

from __future__ import annotations

import json
from typing import Any

from scipy.stats import spearmanr

from benchmarks.schemes.shared import RESULTS, save

SMALLER_IS_BETTER = ("mean loss", "tail loss")


def main() -> None:
    table = []
    for data in ("adult", "law"):
        rows = []
        for path in sorted(RESULTS.glob(f"schemes_choosing_*_{data}.json")):
            rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not rows:
            continue
        for grouping in [k for k in rows[0] if k.startswith("worst ") and " x " in k]:
            row: dict[str, Any] = {"data": data, "true": grouping, "runs": len(rows)}
            for seen in rows[0]["visible"]:
                sign = -1 if seen in SMALLER_IS_BETTER else 1
                values = [sign * run["visible"][seen] for run in rows]
                row[f"by {seen}"] = float(spearmanr(values, [r[grouping] for r in rows]).statistic)
            table.append(row)
    save("schemes_selection", table, fast=False)


if __name__ == "__main__":
    main()

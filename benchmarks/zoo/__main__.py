"""Time, peak memory and exactness of an IRW step on many architectures.

    python -m benchmarks.zoo                      # all, and the files under benchmarks/results
    python -m benchmarks.zoo --only BERT "U-Net"  # a look at some
    python -m benchmarks.zoo --growth             # the ratio at B = 16, 64, 256
    python -m benchmarks.zoo --again              # the figure of what is stored

Each model has a process of its own, with one thread; one that fails is a row with its error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.zoo.alone import alone, as_json, measured
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.registry import ENTRIES, GROWING, named
from benchmarks.zoo.report import as_markdown, draw, growth_as_markdown, summary

SIZES = (16, 64, 256)
SECONDS, QUICK_SECONDS = 3.0, 0.6
LONGEST = 600
"""Seconds after which a model counts as failed."""


def main() -> None:
    chosen = report.arguments(
        __doc__,
        None,
        only={"nargs": "+", "metavar": "NAME", "help": "these entries; nothing is stored"},
        family={"help": "entries of this family; nothing is stored"},
        list="show the entries and stop",
        quick="few pairs of steps; nothing is stored",
        no_exact="without the loop in float64",
        growth="the ratio at B = 16, 64, 256",
        again="the figure of stored results",
        out={"type": Path, "default": report.RESULTS},
        one={"metavar": "NAME", "help": "in this process; prints JSON"},
        size={"type": int, "help": "B of that one"},
    )
    seconds = QUICK_SECONDS if chosen.quick else SECONDS
    if chosen.one:
        entry = named(chosen.one)
        size = chosen.size or entry.size
        print(json.dumps(measured(entry, size, seconds, exact=not chosen.no_exact)))
        return
    if chosen.again:
        models = json.loads((chosen.out / "zoo.json").read_text())["models"]
        draw([found for found in models if "time" in found])
        return
    entries = _chosen(chosen.only, chosen.family)
    flags = ["--quick"] * chosen.quick + ["--no-exact"] * (chosen.no_exact or chosen.growth)
    if chosen.list:
        print("\n".join(f"{e.family:24s} B = {e.size:<5d} {e.name}" for e in entries))
    elif chosen.growth:
        found = measure([(named(name), size) for name in GROWING for size in SIZES], flags)
        growth = {name: [f for f in found if f["name"] == name] for name in GROWING}
        curves = {name: list(map(rounded, points)) for name, points in growth.items()}
        text, path = growth_as_markdown(growth), chosen.out / "zoo_growth"
        _show(text, {"growth": curves}, None if chosen.quick else path)
    else:
        found = measure([(entry, entry.size) for entry in entries], flags)
        whole = not (chosen.quick or chosen.only or chosen.family)
        drawn = [f for f in found if "time" in f]
        result = {"summary": summary(drawn), "models": list(map(rounded, found))}
        _show(as_markdown(found), result, chosen.out / "zoo" if whole else None)
        if whole:
            draw(drawn)


def measure(work: Sequence[tuple[Entry, int]], flags: Sequence[str]) -> list[dict[str, Any]]:
    """What each entry costs at its batch size, one after the other, each in a fresh process."""
    found = []
    for number, (entry, size) in enumerate(work, 1):
        arguments = ["--one", entry.name, "--size", str(size), *flags]
        found.append({"size": size} | alone(entry, "benchmarks.zoo", arguments, LONGEST))
        print(f"{number:3d}/{len(work)} {_line(found[-1])}", flush=True)
    return found


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four digits are enough."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def _chosen(names: list[str] | None, family: str | None) -> list[Entry]:
    try:
        entries = ENTRIES if names is None else [named(name) for name in names]
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    families = sorted({entry.family for entry in ENTRIES})
    if family is not None and family not in families:
        raise SystemExit(f"--family {family!r}: expected one of {', '.join(families)}")
    return [entry for entry in entries if family in (None, entry.family)]


def _show(table: str, result: dict[str, Any], path: Path | None) -> None:
    machine = f"{report.processor()}, 1 thread, {report.versions()}, alpha 0.2"
    text = f"{machine}\n\n{table}"
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".md").write_text(text)
        path.with_suffix(".json").write_text(as_json({"machine": machine} | result))
        print(f"written to {path}.md and .json")


def _line(found: dict[str, Any]) -> str:
    if "time" not in found:
        return f"{found['name']:40s} fails: {found['fails'][:80]}"
    return (
        f"{found['name']:40s} {found['milliseconds']:8.2f} ms  time {found['time']:6.2f}  "
        f"memory {found['memory']:5.2f}  {found['path']}"
    )


if __name__ == "__main__":
    main()

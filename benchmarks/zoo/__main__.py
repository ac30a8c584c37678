"""Time, peak memory and exactness of an IRW step on many architectures.

    python -m benchmarks.zoo                      # all, and the files under benchmarks/results
    python -m benchmarks.zoo --only BERT "U-Net"  # a look at some
    python -m benchmarks.zoo --growth             # the ratio at B = 16, 64, 256
    python -m benchmarks.zoo --again              # the figure of what is stored

Each model has a process of its own, with one thread; one that fails is a row with its error.
"""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import report
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.exactness import errors
from benchmarks.zoo.measuring import cost
from benchmarks.zoo.registry import ENTRIES, GROWING, named
from benchmarks.zoo.report import alone, as_json, as_markdown, draw, growth_as_markdown, summary

SIZES = (16, 64, 256)
SECONDS, QUICK_SECONDS = 3.0, 0.6
LONGEST = 600
"""Seconds after which a model counts as failed."""
FAMILIES = sorted({entry.family for entry in ENTRIES})


def main() -> None:
    chosen = report.arguments(
        __doc__,
        None,
        only={"nargs": "+", "metavar": "NAME", "help": "these entries; nothing is stored"},
        family={"choices": FAMILIES, "help": "its entries; nothing is stored"},
        list="show the entries and stop",
        quick="few pairs of steps; nothing is stored",
        no_exact="without the loop in float64",
        growth="the ratio at B = 16, 64, 256",
        again="the figure of stored results",
        one={"metavar": "NAME", "help": "in this process; prints JSON"},
        size={"type": int, "help": "B of that one"},
    )
    try:
        entries = [named(name) for name in chosen.only] if chosen.only else ENTRIES
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    entries = [entry for entry in entries if chosen.family in (None, entry.family)]
    flags = ["--quick"] * chosen.quick + ["--no-exact"] * (chosen.no_exact or chosen.growth)
    if chosen.one:
        seconds = QUICK_SECONDS if chosen.quick else SECONDS
        found = measured(named(chosen.one), chosen.size, seconds, exact=not chosen.no_exact)
        print(json.dumps(found))
    elif chosen.again:
        draw(json.loads((report.RESULTS / "zoo.json").read_text())["models"])
    elif chosen.list:
        print("\n".join(f"{e.family:24s} B = {e.size:<5d} {e.name}" for e in entries))
    elif chosen.growth:
        found = measure([(named(name), size) for name in GROWING for size in SIZES], flags)
        growth = {name: [f for f in found if f["name"] == name] for name in GROWING}
        curves = {name: list(map(rounded, points)) for name, points in growth.items()}
        show("zoo_growth", growth_as_markdown(growth), {"growth": curves}, not chosen.quick)
    else:
        whole = not (chosen.quick or chosen.only or chosen.family)
        found = measure([(entry, entry.size) for entry in entries], flags)
        result = {"summary": summary(found), "models": list(map(rounded, found))}
        show("zoo", as_markdown(found), result, whole)
        if whole:
            draw(found)


def measured(entry: Entry, size: int | None, seconds: float, exact: bool) -> dict[str, Any]:
    """What is found of one entry in this process, or why it fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"name": entry.name, "family": entry.family}
    try:
        found |= cost(entry, size or entry.size, seconds)
        if exact:
            found |= errors(entry, size or entry.size)
    except Exception as error:
        found["fails"] = f"{type(error).__name__}: {error}"[:300]
    return found


def measure(work: Sequence[tuple[Entry, int]], flags: Sequence[str]) -> list[dict[str, Any]]:
    """What each entry costs at its batch size, one after the other, each in a fresh process."""
    rows = []
    for number, (entry, size) in enumerate(work, 1):
        arguments = ["--one", entry.name, "--size", str(size), *flags]
        found = {"size": size} | alone(entry, "benchmarks.zoo", arguments, LONGEST)
        rows.append(found)
        text = f"fails: {found.get('fails', '')[:80]}"
        if "time" in found:
            text = f"{found['milliseconds']:8.2f} ms  time {found['time']:6.2f}  "
            text += f"memory {found['memory']:5.2f}  {found['path']}"
        print(f"{number:3d}/{len(work)} {entry.name:40s} {text}", flush=True)
    return rows


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four digits are enough."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def show(name: str, table: str, result: dict[str, Any], stored: bool) -> None:
    machine = f"{report.processor()}, 1 thread, {report.versions()}, alpha 0.2"
    text = f"{machine}\n\n{table}"
    print(text)
    if stored:
        report.write(name, text)
        (report.RESULTS / f"{name}.json").write_text(as_json({"machine": machine} | result))


if __name__ == "__main__":
    main()

"""What torch.compile makes of each model of the zoo, with the optimizer and without it.

    python -m benchmarks.zoo.compiled                                # aot_eager, before wrapping
    python -m benchmarks.zoo.compiled --backend inductor --order after --only nanoGPT LSTM

Three epochs of two batches and a shorter last one, in float64; every step is compared with a loop
of plain autograd over the losses. The model is compiled before the optimizer comes, after it, or
"in place": by `model.compile()`, before. Each model has a process of its own. What is found of it
replaces its row for that backend and order in the stored file: a run may be stopped and taken up.
"""

import json
import logging
import warnings
from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.cost.neighbours import ALPHA
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.exactness import differences, in_double, reference
from benchmarks.zoo.measuring import Loop
from benchmarks.zoo.registry import ENTRIES, named
from benchmarks.zoo.report import alone, as_json
from irw_optim.gradients.graph import walk

SIZES = (5, 5, 3)
EPOCHS = 3
LONGEST = 240
"""Seconds after which a model counts as failed."""

RESULTS = report.RESULTS / "zoo_compiled.json"


def main() -> None:
    chosen = report.arguments(
        __doc__,
        None,
        backend={"choices": ("aot_eager", "inductor"), "default": "aot_eager"},
        order={"choices": ("before", "after", "in place"), "default": "before"},
        only={"nargs": "+", "metavar": "NAME", "help": "these entries"},
        one={"metavar": "NAME", "help": "in this process; nothing is stored"},
    )
    if chosen.one:
        print(json.dumps(looked_at(named(chosen.one), chosen.backend, chosen.order)))
        return
    for entry in ENTRIES if chosen.only is None else map(named, chosen.only):
        how = ["--backend", chosen.backend, "--order", chosen.order]
        found = alone(entry, "benchmarks.zoo.compiled", ["--one", entry.name, *how], LONGEST)
        found |= {"name": entry.name, "backend": chosen.backend, "order": chosen.order}
        print(found, flush=True)
        store(found)


def store(found: dict[str, Any]) -> None:
    """Replace the row of one model, and make the table anew."""
    rows = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else []
    key = ("name", "backend", "order")
    rows = [row for row in rows if [row[k] for k in key] != [found[k] for k in key]]
    place = {entry.name: number for number, entry in enumerate(ENTRIES)}
    rows = sorted([*rows, found], key=lambda r: (r["backend"], r["order"], place[r["name"]]))
    RESULTS.write_text(as_json({"models": rows}))
    report.write(RESULTS.stem, as_markdown(rows))
    report.write(f"{RESULTS.stem}_summary", summary(rows))


def looked_at(entry: Entry, backend: str, order: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    import torch._inductor.config as inductor

    inductor.fallback_random = True  # dropout draws what it draws without the compiler
    found = kind_of(entry)
    for what, alpha in (("plain", None), ("ours", ALPHA)):
        try:
            found[what] = trained(entry, backend, order, alpha)
        except Exception as error:
            found[what] = {"fails": f"{type(error).__name__}: {error}"[:300]}
    return found


def kind_of(entry: Entry) -> dict[str, Any]:
    """How many modules hold parameters, and whether the model itself computes in float32."""
    model, (inputs, _) = entry.make().double(), in_double(entry.draw(SIZES[0]))
    nodes = walk(model(*inputs).double().flatten(1).sum(1)).order
    dtypes = {output.dtype for node in nodes for output in node._input_metadata}  # type: ignore[attr-defined]
    holders = [module for module in model.modules() if module._parameters]
    return {"layers": len(holders), "float32": torch.float32 in dtypes}


def trained(entry: Entry, backend: str, order: str, alpha: float | None) -> dict[str, Any]:
    """Train a compiled model, plainly without alpha; else every step is compared."""
    counted = Counted()
    model, twin = entry.make().double(), entry.make().double()
    called = model if order == "after" else compiled(model, backend, order)
    loop = Loop.of(entry, called, in_double(entry.draw(SIZES[0])), alpha)
    if order == "after":
        called = compiled(model, backend, order)
    error = 0.0
    for epoch in range(EPOCHS):
        for place, size in enumerate(SIZES):
            batch = in_double(entry.draw(size, seed=1 + epoch * len(SIZES) + place))
            twin.load_state_dict(model.state_dict())
            torch.manual_seed(2)
            replace(loop, model=called, batch=batch).backward()
            if alpha is not None:
                error = max(error, *differences(loop, *reference(entry, twin, batch)))
            loop.optimizer.step()
            counted.step_ends(size)
        counted.epoch_ends()
    found = counted.found()
    if alpha is not None:
        kept_out = "kept out" in loop.optimizer.engine.told  # type: ignore[attr-defined]
        found |= {"error": error, "left_uncompiled": kept_out}
    return found


def compiled(model: nn.Module, backend: str, order: str) -> nn.Module:
    """What is to be called in place of the model."""
    if order != "in place":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    model.compile(backend=backend)
    return model


class Counted(logging.Handler):
    """What dynamo counts of a training from here on, and how often it gave up on a function."""

    def __init__(self) -> None:
        import torch._dynamo as dynamo
        from torch._dynamo.utils import counters

        super().__init__(logging.WARNING)
        torch.compiler.reset()
        counters.clear()
        self.counters, self.limits, self.ends = counters, 0, [0]
        self.breaks: Counter[int] = Counter()  # by the size of the batch that they came with
        self.so_far = 0
        self.reset, dynamo.reset = dynamo.reset, self.code_is_dropped
        logging.getLogger("torch._dynamo").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.limits += "recompile_limit" in record.getMessage()

    def code_is_dropped(self) -> None:
        """Earlier breaks are not those of what will be trained with."""
        self.reset()
        self.step_ends(0)
        self.breaks.clear()

    def step_ends(self, size: int) -> None:
        before, self.so_far = self.so_far, sum(self.counters["graph_break"].values())
        self.breaks[size] += self.so_far - before

    def epoch_ends(self) -> None:
        self.ends.append(self.counters["frames"]["total"])

    def found(self) -> dict[str, Any]:
        import torch._dynamo as dynamo

        logging.getLogger("torch._dynamo").removeHandler(self)
        dynamo.reset = self.reset
        return {
            "breaks": max(self.breaks.values()),  # another size compiles all of it once more
            "graphs": self.counters["stats"]["unique_graphs"],
            "compiled_in_epochs": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "limits": self.limits,
        }


# The table ------------------------------------------------------------------------------------

Found = dict[str, Any]

EXACT, EXACT_IN_FLOAT32 = 1e-10, 1e-5
"""The error that a row may have; the second where the model itself computes in float32."""

EXPLANATION = (
    "Three epochs of batches of 5, 5 and 3 samples. Breaks: as torch counts them for one "
    "size in the code that is trained with in the end (≤: an earlier run also counted those of "
    "code that was dropped, or of the other size). Compiled regions: all, for both sizes. "
    "Error: the largest one of weights and gradients in all steps, against a loop of plain "
    "autograd in float64; * where the model itself computes in float32.\n"
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
    return report.table(columns, map(_row, rows), [True] * len(columns)) + "\n" + EXPLANATION


def summary(rows: list[Found]) -> str:
    """A row for each backend and order."""
    groups = [_counts(key, list(group)) for key, group in groupby(rows, _way)]
    return report.table(COLUMNS, groups, [True] * len(COLUMNS))


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


def _breaks(part: Found) -> tuple[int, str]:
    """Their number, and how it is written."""
    most = part.get("breaks_at_most")
    number: int = part.get("breaks", 0) if most is None else most
    return number, str(number) if most is None else f"≤ {number}"


def _way(row: Found) -> tuple[str, str]:
    return row["backend"], row["order"]


def _counts(key: tuple[str, str], rows: list[Found]) -> list[str]:
    plain, ours = ([_part(row, what) for row in rows] for what in ("plain", "ours"))
    ways = [way_of(row) for row in rows]
    added = [_breaks(o)[0] - _breaks(p)[0] for o, p in zip(ours, plain, strict=True)]
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
        "" if "fails" in part else f"{_breaks(part)[1]}, {part['graphs']}"
        for part in (_part(row, "plain"), _part(row, "ours"))
    ]
    error = _part(row, "ours").get("error")
    text = "" if error is None else f"{error:.0e}" + "*" * row.get("float32", False)
    layers = str(row.get("layers", ""))
    return [row["name"], ", ".join(_way(row)), layers, *counts, text, way_of(row)]


if __name__ == "__main__":
    main()

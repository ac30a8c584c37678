"""A GPU's tests and costs in one run: time, memory, waits and kernels of a step.

    python -m benchmarks.gpu                          # what `make gpu` runs
    python -m benchmarks.gpu --device cpu --fast      # its logic, where there is no card

Every method runs in turns with a plain step of the same model and setting. What has been measured
when the time is up is written to results/gpu_<card>.csv and .md.
"""

import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.cost.neighbours import ALPHA, Step
from benchmarks.cost.steps import Makers, makers, measured, table
from benchmarks.models import TABLE
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.measuring import Loop
from benchmarks.zoo.registry import named

NO_CARD = (
    "no CUDA device: torch.cuda.is_available() is False, so nothing was measured. On a machine "
    "with a card, check `nvidia-smi` and that torch was built for CUDA; "
    "`python -m benchmarks.gpu --device cpu --fast` tries the logic without one"
)
TESTS = ("tests/device", "tests/gradients/test_layers.py", "tests/gradients/test_loops.py")
LONGEST_TESTS = 150
"""Seconds that the tests may take of the whole."""

COLUMNS = ("work", "setting", "method", "ms", "time", "MB", "memory", "syncs", "kernels", "fails")


def main(given: Sequence[str] | None = None) -> None:
    """Run the tests, then measure until the time is up."""
    chosen = report.options(
        __doc__,
        sys.argv[1:] if given is None else given,
        device={"default": "cuda"},
        minutes={"type": float, "default": 8.0},
        repeats={"type": int, "default": 15},
    )
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_CARD)
    end = time.monotonic() + 60 * chosen.minutes
    if device.type == "cuda":
        print(tested(device), flush=True)
    repeats = 2 if chosen.fast else chosen.repeats
    wanted = list(rows(device))[:1] if chosen.fast else rows(device)
    frame = pd.DataFrame(measured_until(end, wanted, device, repeats), columns=COLUMNS)
    text = f"{card(device)}, torch {torch.__version__}\n\n{as_markdown(frame)}"
    name = "gpu_" + re.sub(r"\W+", "_", card(device)).strip("_").lower()
    report.save(name, frame, chosen.fast, text, machine=card(device))


def card(device: torch.device) -> str:
    """Its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return report.processor()


def tested(device: torch.device) -> str:
    """The last line of the tests that need a device."""
    path = os.pathsep.join([str(report.ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TEST_DEVICE": device.type}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "pretend_gpu.plugin"]
    try:
        finished = subprocess.run(
            [*command, *TESTS], cwd=report.ROOT, env=environment, capture_output=True, text=True,
            timeout=LONGEST_TESTS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the tests took more than {LONGEST_TESTS} s"
    report.write("gpu_tests", finished.stdout + finished.stderr)
    last = (finished.stdout.strip() or finished.stderr.strip()).splitlines()[-1:]
    return f"tests: {''.join(last)} (results/gpu_tests.md has all of it)"


def measured_until(
    end: float, wanted: "Iterable[Row]", device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row of the table for every method, as long as there is time."""
    for row in wanted:
        if time.monotonic() > end:
            print(f"the time is up before {row.work}, {row.setting}")
            return
        print(f"{row.work}, {row.setting}", flush=True)
        yield from counted(row, device, repeats)


def counted(row: "Row", device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Time, memory, waits and kernels of each method; or why it does not run."""
    for step, found in measured(row.makers, device, repeats):
        found |= {"work": row.work, "setting": row.setting}
        if step is not None:
            found |= {"syncs": syncs(step, device), "kernels": kernels(step, device)}
        yield found


def as_markdown(frame: pd.DataFrame) -> str:
    """A line for every model and setting."""
    methods = dict.fromkeys(("plain", *frame["method"]))
    note = (
        "\nTime / peak memory of what a step adds, as multiples of a plain step in the same run "
        "(of the plain step itself: ms / MB) / waits for the device / kernels.\n"
    )
    frame = frame.assign(fails=frame["work"] + ": " + frame["fails"])
    return table(frame, ["work", "setting"], list(methods), _text, note)


def _text(cell: dict[str, Any] | None, method: str) -> str:
    if cell is None:
        return ""
    if pd.isna(cell["ms"]):
        return "does not run"
    time_and_memory = f"{cell['time']:.2f} / {cell['memory']:.2f}"
    if method == "plain":
        time_and_memory = f"{cell['ms']:.2f} / {cell['MB']:.0f}"
    counted = [number for number in (cell["syncs"], cell["kernels"]) if not pd.isna(number)]
    return time_and_memory + "".join(f" / {number:.0f}" for number in counted)


# What is measured -----------------------------------------------------------------------------

OURS = "ours, ghost"
EVERYBODY = ("plain", OURS, "Opacus hooks", "torch.func")
ZOO = ("nanoGPT", "ViT, class token", "ResNet-18", "ConvNeXt", "BERT", "Llama", "LSTM", "LoRA")
"""Measured eager, against a plain step."""


class InAutocast(nn.Module):
    """A model whose forward runs in bfloat16 where autocast has it so; its output is float32."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.model(x).float()


class Row(NamedTuple):
    """A model's name, its setting (eager, autocast or compiled), and ways to step, plain first."""

    work: str
    setting: str
    makers: Makers


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def rows(device: torch.device) -> Iterator[Row]:
    """All that is measured, what matters most first."""
    for work in TABLE:
        yield Row(work.name, "eager", makers(work, EVERYBODY, device))
    in_autocast = partial(InAutocast, device=device)
    for work in TABLE:
        yield Row(work.name, "autocast", makers(work, EVERYBODY[:3], device, in_autocast))
    for name in ZOO:
        yield Row(name, "eager", _of_the_zoo(named(name), device))
    for work in TABLE[-2:]:  # a compiler takes long, and leaves no rows for others to take
        yield Row(work.name, "compiled", makers(work, EVERYBODY[:2], device, _compiled))


def _of_the_zoo(entry: Entry, device: torch.device) -> Makers:
    def maker(alpha: float | None) -> Callable[[], Step]:
        def make() -> Step:
            inputs, target = entry.draw()
            batch = (tuple(t.to(device) for t in inputs), target.to(device))
            return Loop.of(entry, entry.make().to(device), batch, alpha).step

        return make

    return {"plain": maker(None), OURS: maker(ALPHA)}


# Counting -------------------------------------------------------------------------------------

WAITS = "synchronizing CUDA operation"
"""What torch's warning says, in its sync debug mode."""

COPIES = ("Memcpy", "Memset")


def syncs(step: Step, device: torch.device) -> int | None:
    """How often the host waits in one call; None where nothing tells."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return warned(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def warned(step: Step) -> int:
    """How many warnings of a wait one call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return sum(WAITS in str(warning.message) for warning in caught)


def kernels(step: Step, device: torch.device) -> int | None:
    """How many kernels one call starts; None where there are none."""
    if device.type != "cuda":
        return None
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        step()
        torch.cuda.synchronize(device)
    return on_device(profile.events())


def on_device(events: Iterable[Any]) -> int:
    """How many of a profiler's events are kernels, and no copies."""
    ran = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(COPIES) for event in ran)


if __name__ == "__main__":
    main()

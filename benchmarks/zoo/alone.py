"""One entry in a process of its own, with one thread; and how what is found is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.zoo.entry import Entry
from benchmarks.zoo.exactness import errors
from benchmarks.zoo.measuring import cost


def alone(entry: Entry, module: str, arguments: Sequence[str], longest: int) -> dict[str, Any]:
    """What ``python -m module`` prints as its last line, in JSON, within ``longest`` seconds.

    One that fails is a row with its error.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    told = {"env": os.environ | threads, "capture_output": True, "text": True}
    try:
        finished = subprocess.run(command, timeout=longest, check=False, **told)
        return json.loads(finished.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except subprocess.TimeoutExpired:
        reason = f"took more than {longest} s"
    except (IndexError, json.JSONDecodeError):
        reason = f"ended with {finished.returncode}: {finished.stderr.strip()[-200:]}"
    return {"name": entry.name, "family": entry.family, "fails": reason}


def measured(entry: Entry, size: int, seconds: float, exact: bool) -> dict[str, Any]:
    """What is found of one entry in this process, or why it fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"name": entry.name, "family": entry.family}
    try:
        found |= cost(entry, size, seconds)
        if exact:
            found |= errors(entry, size)
    except Exception as error:
        found["fails"] = f"{type(error).__name__}: {error}"[:300]
    return found


def as_json(result: dict[str, Any]) -> str:
    """One line an entry, which shows in a diff what has changed."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"

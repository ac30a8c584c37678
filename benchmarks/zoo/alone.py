"""One entry in a process of its own, with one thread; and how what is found is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.zoo.entry import Entry


def alone(entry: Entry, module: str, arguments: Sequence[str], longest: int) -> dict[str, Any]:
    """What a command prints as its last line, in JSON; one that fails is a row with its error.

    Args:
        entry: what is measured.
        module: as after ``python -m``.
        arguments: of the command.
        longest: seconds until it counts as failed.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        finished = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | threads,
            capture_output=True,
            text=True,
            timeout=longest,
            check=False,
        )
        return json.loads(finished.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except subprocess.TimeoutExpired:
        reason = f"took more than {longest} s"
    except (IndexError, json.JSONDecodeError):
        reason = f"ended with {finished.returncode}: {finished.stderr.strip()[-200:]}"
    return {"name": entry.name, "family": entry.family, "fails": reason}


def as_json(result: dict[str, Any]) -> str:
    """One line an entry, which shows in a diff what has changed."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"

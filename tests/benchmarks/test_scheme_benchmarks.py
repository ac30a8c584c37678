"""The benchmarks run, in seconds where asked to, and leave no results then."""

import os
import subprocess
import sys

import pytest

from benchmarks.data.memory import law_school
from benchmarks.report import RESULTS, ROOT

WITHOUT_DATA_OF_THEIR_OWN = [
    *(f"cost {name}" for name in ("renewal", "scaling", "local")),
    "schemes variance",
    *(f"schemes scores {part}" for part in ("train", "time")),
    *(f"schemes choosing {part}" for part in ("alpha", "options", "schemes", "held")),
]


def stored():
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.*")}


@pytest.mark.slow
@pytest.mark.parametrize("command", WITHOUT_DATA_OF_THEIR_OWN)
def test_a_fast_run_ends_in_a_table_and_stores_nothing(command):
    before = stored()
    name, *part = command.split()
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *part, "--fast"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) > 4
    assert len({line.count("|") for line in lines[-3:]}) == 1
    assert stored() == before


def test_law_school_says_where_its_data_come_from(monkeypatch):
    monkeypatch.delenv("IRW_OPTIM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="IRW_OPTIM_DATA is not set"):
        law_school()

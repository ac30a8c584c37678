"""The example, as its reader starts it: by torchrun in two processes, and in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("tqdm", "pandas"):
    pytest.importorskip(library, reason="the examples need the report extra")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "distributed.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def table(*launcher: str) -> list[list[str]]:
    """The cells of what it prints, by row."""
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLE, "--epochs", "1"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    _, header, *rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return rows


def test_two_processes_print_the_table_of_one():
    """But for people whom rounding puts on the other side: of 16,281, a few of the nearest."""
    together, alone = table(*TORCHRUN), table()
    assert [row[0] for row in together] == ["plain", "IRW", "IRW, centred"]
    assert [row[3] for row in together] == ["yes"] * 3
    for row, expected in zip(together, alone, strict=True):
        assert [row[0], *row[3:]] == [expected[0], *expected[3:]]
        for share, as_one in zip(row[1:3], expected[1:3], strict=True):
            assert float(share.rstrip("%")) == pytest.approx(float(as_one.rstrip("%")), abs=1.0)

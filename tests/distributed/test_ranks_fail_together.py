"""A rank that raises, dies or hangs ends the others with an error, within the group's time-out."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_trainings import CAN_SHARD

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("faulty.py")


@pytest.mark.parametrize(
    ("fault", "spread"),
    [("raises", "ddp"), ("dies", "ddp"), ("hangs", "ddp"), ("dies", "fsdp")],
)
def test_a_fault_of_one_rank_ends_the_other(fault, spread, tmp_path):
    if spread == "fsdp" and not CAN_SHARD:
        pytest.skip("refused with this torch")
    file = tmp_path / "rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), fault, str(file), spread],
            stderr=subprocess.DEVNULL,  # one of them is meant to fail
        )
        for rank in (0, 1)
    ]
    try:
        ranks[0].wait(timeout=100)
        ended = ranks[1].poll()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 3
    if fault == "dies":
        assert ended == -signal.SIGKILL
    waited, *_ = Path(f"{file}.0").read_text().splitlines()
    assert float(waited) < 30  # the time-out is 4 s; the machine may be busy

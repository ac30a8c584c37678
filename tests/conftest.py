"""What every test starts from: the same seeds, one thread, its own log, and no other warnings."""

import logging
import multiprocessing
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The benchmarks are part of the repository, not of the package.
sys.path.insert(0, str(Path(__file__).parents[1]))

# Loaded by `make test-device` alone: it makes another device the default one.
collect_ignore = ["pretend_gpu"]

# Without the report extra there is nothing to test of them.
collect_ignore += [] if find_spec("pandas") else ["benchmarks"]

# Tiny tensors: a second thread only costs. `make test-machines` tries two.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# Where a loader's workers come from a fork server (Python 3.14), it imports once for all of them.
multiprocessing.set_forkserver_preload(["irw_optim"])

# The same examples in every run, and no clock: a test fails for what the code does.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log():
    """An example that a test runs may silence the library; the next test wants to hear it."""
    logger = logging.getLogger("irw_optim")
    level = logger.level
    yield
    logger.setLevel(level)

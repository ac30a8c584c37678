"""What every test starts from: the same seeds, one thread, and no warnings but known ones."""

import pytest
import torch
from hypothesis import settings

# Tiny tensors: a second thread only costs, and one thread adds in the same order every time.
torch.set_num_threads(1)

# The same examples in every run, and no clock: a test fails for what the code does.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

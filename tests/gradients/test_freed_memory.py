"""What a pass frees stays with the process, so that the next one does not fetch it page by page."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch
from torch import nn

from irw_optim import IRWOptimizer

held = [torch.ones(2**21) for _ in range(4)]
if sys.argv[1] == "ours":
    model = nn.Linear(2, 2)
    IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model)
for turn in range(30):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(2**21) for _ in range(7)]
    del made
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(whose: str) -> int:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, whose], env=settings, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.cpu("the host's allocator")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_an_optimizer_has_the_allocator_keep_what_is_freed():
    many = 1000
    # Where blocks come to lie differs from process to process.
    if all(faults("plain") < many for _ in range(4)):
        pytest.skip("this allocator keeps it anyway")
    assert faults("ours") < many

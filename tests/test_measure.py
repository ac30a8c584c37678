"""What a step is said to hold is what it holds."""

import torch

from irw_optim.model_check import peak_bytes

MEGA = 2**20  # bytes


def megabytes(number: int) -> torch.Tensor:
    return torch.empty(number * MEGA, dtype=torch.uint8)


class Step:
    """Lets go of what it kept, holds 8 and 4 MiB at once, and keeps 2 MiB."""

    def __init__(self) -> None:
        self.kept: torch.Tensor | None = megabytes(2)

    def __call__(self) -> None:
        self.kept = None
        held = megabytes(8), megabytes(4)
        del held
        self.kept = megabytes(2)


def test_the_most_at_once_beyond_what_stays():
    for _ in range(3):  # what an earlier measurement saw does not count in a later one
        assert peak_bytes(Step()) == 12 * MEGA


def test_what_stays_is_held_with_what_comes_after():
    step = Step()

    def keeps_first() -> None:
        step.kept = None
        step.kept = megabytes(2)
        megabytes(8)

    assert peak_bytes(keeps_first) == 10 * MEGA

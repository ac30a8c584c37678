"""The old place of `benchmarks.cost.neighbours`."""

from benchmarks.cost.neighbours import *  # noqa: F403

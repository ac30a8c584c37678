"""The old place of `benchmarks.models`."""

from benchmarks.models import *  # noqa: F403

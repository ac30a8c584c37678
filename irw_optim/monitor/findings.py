"""What `IRWMonitor.diagnose` returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One way in which the training fails; ``print(finding)`` shows it.

    Attributes:
        name: stays the same from version to version; the table of names is in
            ``docs/diagnostics.md``.
        says: what was seen, with the figures in it.
        figures: the figures alone, by name.
        advice: what to change.

    >>> print(Finding("few_worst_off", "S has 2 samples.", {"worst_off_samples": 2.0}, "More."))
    few_worst_off: S has 2 samples.
      What to change: More.
    """

    name: str
    says: str
    figures: dict[str, float]
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says}\n  What to change: {self.advice}"

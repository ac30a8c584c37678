"""How this package's objects are copied and pickled."""

from __future__ import annotations

from typing import Any, ClassVar


class Renewed:
    """Copies and pickles carry what lasts; what belongs to one process or one moment begins anew.

    Attributes:
        PASSING: the names of the latter, which `begin` sets.
    """

    PASSING: ClassVar[tuple[str, ...]]

    def begin(self) -> None:
        """Set what passes, in a new object and in a copy alike."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.PASSING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.begin()

"""What is put on modules that belong to somebody else, how it comes off, and what copies carry.

An attachment is on a module once, for as long as somebody holds it, and in no copy of the module.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

_Attached = TypeVar("_Attached", bound="Attachment")


class Renewed:
    """Begins anew in copies and pickles with the attributes that are named ``PASSING``."""

    PASSING: ClassVar[tuple[str, ...]]

    def begin(self) -> None:
        """Set these, in a new object and in a copy alike."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.PASSING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.begin()


class Change(Protocol):
    """What was done to a module, without holding it."""

    def remove(self) -> None:
        """Undo it, unless somebody has put something else there since."""

    def clean(self, state: dict[str, Any]) -> None:
        """The same in a copy of the module's ``__dict__``."""


Removable = RemovableHandle | Change


class Attachment:
    """Something on a module, until nobody holds this object."""

    def __init__(self, module: nn.Module) -> None:
        self.handles: list[Removable] = []
        self.remove = finalize(self, remove_all, self.handles)
        self.remove.atexit = False
        try:
            self.plain_copies = None if isinstance(self, PlainCopies) else PlainCopies.on(module)
            for handle in self.put_on(module):
                self.handles.append(handle)
            _THERE.setdefault(module, WeakValueDictionary())[type(self)] = self
        except BaseException:
            self.remove()
            self.plain_copies = None  # the traceback holds this object
            raise

    @classmethod
    def on(cls: type[_Attached], module: nn.Module) -> _Attached:
        """The one that is there, or a new one."""
        return cls.found_on(module) or cls(module)

    @classmethod
    def found_on(cls: type[_Attached], module: nn.Module) -> _Attached | None:
        """The one that is there, if any."""
        there: Any = _THERE.get(module, {})
        found: Any = there.get(cls)
        return found if found and found.remove.alive else None

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        raise NotImplementedError


_THERE: WeakKeyDictionary[nn.Module, WeakValueDictionary[type, Attachment]] = WeakKeyDictionary()


def remove_all(handles: list[Removable]) -> None:
    """Empty the list, last first."""
    while handles:
        handles.pop().remove()


class Replacement:
    """Stands in a module's ``__dict__``."""

    previous: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # on its way into a copy that is cleaned at once


class OfModule(Replacement):
    """One that knows its module without holding it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None, "called by nobody else"
        return module


class Replaced:
    """Lets a replacement stand there under a name."""

    def __init__(self, module: nn.Module, name: str, replacement: Replacement) -> None:
        replacement.previous = vars(module).get(name)
        vars(module)[name] = replacement
        self.module, self.name, self.replacement = ref(module), name, ref(replacement)

    def remove(self) -> None:
        module = self.module()
        if module is not None and vars(module).get(self.name) is self.replacement():
            self.clean(vars(module))

    def clean(self, state: dict[str, Any]) -> None:
        ours = state.get(self.name)
        if isinstance(ours, Replacement):
            del state[self.name]
            if ours.previous is not None:
                state[self.name] = ours.previous


class PlainCopies(Attachment):
    """Has copies and pickles without attachments: ``__reduce_ex__`` is looked up on the object."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        yield Replaced(module, "__reduce_ex__", _Reduce(module))
        if hasattr(type(module), "__deepcopy__"):
            yield Replaced(module, "__deepcopy__", _Deepcopy(module))


class _Reduce(OfModule):
    def __call__(self, protocol: Any) -> Any:
        module = self.module
        return _cleaned(type(module).__reduce_ex__(module, protocol), module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Where the class was changed since, and copies the ``__dict__`` as it is."""
        twin = memo.get(id(self._module()))
        return self if twin is None else _Reduce(twin)


class _Deepcopy(OfModule):
    def __call__(self, memo: dict[int, Any]) -> Any:
        module = self.module
        twin = type(module).__deepcopy__(module, memo)  # type: ignore[attr-defined]
        if twin is not module:
            twin.__dict__ = _cleaned(vars(twin), module)
        return twin


def _cleaned(reduced: Any, module: nn.Module) -> Any:
    """What pickle is told of a module, without attachments."""
    if type(reduced) is tuple:
        return tuple(_cleaned(part, module) for part in reduced)
    if type(reduced) is not dict or "_forward_hooks" not in reduced:
        return reduced
    state = dict(reduced)
    hooks: set[int] = set()
    for attached in _THERE.get(module, {}).values():
        for handle in attached.handles:
            if isinstance(handle, RemovableHandle):
                hooks.add(handle.id)
            else:
                handle.clean(state)
    for name, table in state.items():
        if "hooks" in name and isinstance(table, dict) and not hooks.isdisjoint(table):
            state[name] = type(table)((k, v) for k, v in table.items() if k not in hooks)
    return state

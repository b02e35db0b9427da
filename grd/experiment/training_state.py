"""Taking the state out of the objects of a training, and putting it back into them."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from grd.errors import ResumeError
from grd.experiment.state_encoding import MAX_DEPTH, named_factory

_PLAIN = (bool, int, float, str, bytes, complex, type(None))
_REMOVED = "__grd_removed__"
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a class statement made


def take(item: Any) -> Any:
    """The state of ``item``: of an object by ``state_dict()``, of containers part by part, else the value."""
    return _Taking(None).take(item, "", 0)


def can_be_put_back(item: Any) -> bool:
    """Whether `PuttingBack` can change ``item`` itself: a number or a text cannot be changed."""
    if _is_object(item):
        return hasattr(item, "load_state_dict") or not hasattr(item, "state_dict")
    if type(item) in (list, set, bytearray) or isinstance(item, dict):
        return True
    if type(item) is tuple:
        return all(can_be_put_back(part) for part in item)
    if _is_array(item):
        return bool(item.flags.writeable)
    return _is_tensor(item) or _keeps_all_in_its_attributes(item)


class UserState:
    """The notebook's own ``state`` dictionary as a part of the training.

    What the training removed from it is gone after a resume too; what a changed notebook adds stays. An
    object with ``state_dict()`` can only come back where the notebook has one from the beginning: another
    one is left to the encoding, which refuses or pickles it.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._keys = list(values)
        look = _Taking(None)
        look.take(values, "state", 0)
        self._places = look.places

    def state_dict(self) -> dict[str, Any]:
        """The state of everything in it."""
        taken: dict[str, Any] = _Taking(self._places).take(self.values, "state", 0)
        removed = [key for key in self._keys if key not in self.values]
        return {**taken, _REMOVED: removed} if removed else taken

    def load_state_dict(self, saved: Mapping[str, Any], putting: PuttingBack | None = None) -> None:
        """Make the dictionary what it was. Raises ResumeError naming the entry that does not fit."""
        removed = saved.get(_REMOVED, ())
        wanted = {key: value for key, value in saved.items() if key != _REMOVED}
        wanted.update({key: _AS_IT_IS for key in self.values if key not in wanted and key not in removed})
        self._keys += [key for key in removed if key not in self._keys]
        (putting or PuttingBack()).put(self.values, wanted, "state")

    def unknown_to(self, saved: Mapping[str, Any]) -> set[Any]:
        """The keys that a changed notebook has added: neither ``saved`` nor removed before that."""
        return {key for key in self.values if key not in saved and key not in saved.get(_REMOVED, ())}

    def forget_others(self, saved: Mapping[str, Any], *, keep: Collection[Any]) -> None:
        """Remove what is neither ``saved`` nor in ``keep``: code that ran again has made it."""
        for key in [key for key in self.values if key not in saved and key not in keep]:
            del self.values[key]


class _Taking:
    """One walk over a part; what is met twice is taken once, so that it is one thing after a resume too."""

    def __init__(self, places: Collection[str] | None) -> None:
        self.allowed = places
        self.places: set[str] = set()
        self._taken: dict[int, Any] = {}

    def take(self, item: Any, where: str, depth: int) -> Any:
        if type(item) in _PLAIN or depth > MAX_DEPTH:
            return item
        if _is_object(item):
            return _state_of(item) if self._comes_back_at(where) else item
        if id(item) in self._taken:
            return self._taken[id(item)]
        if isinstance(item, Mapping):
            self._taken[id(item)] = item  # should it contain itself
            parts = {key: self.take(part, f"{where}[{key!r}]", depth + 1) for key, part in item.items()}
            same = all(parts[key] is part for key, part in item.items())
            nameless = type(item) is defaultdict and named_factory(item.default_factory) is None
            if nameless and self._comes_back_at(where):
                result: Any = parts  # put back into the notebook's own, which has the factory
            else:
                result = item if same else _of_the_kind_of(item, parts)
            self._taken[id(item)] = result
        elif type(item) in (list, tuple):
            self._taken[id(item)] = item
            new = [self.take(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(item)]
            same = all(one is other for one, other in zip(new, item, strict=True))
            self._taken[id(item)] = item if same else type(item)(new)
        else:
            return item
        return self._taken[id(item)]

    def _comes_back_at(self, where: str) -> bool:
        self.places.add(where)
        return self.allowed is None or where in self.allowed


def _of_the_kind_of(item: Mapping[Any, Any], parts: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(item) is OrderedDict:
        ordered = OrderedDict(parts)
        vars(ordered).update(vars(item))
        return ordered
    if type(item) is defaultdict:
        return defaultdict(item.default_factory, parts)
    return Counter(parts) if type(item) is Counter else parts


class _Mark:
    """Says something that no saved value can say."""


_AS_IT_IS = _Mark()


class PuttingBack:
    """Puts the parts of one checkpoint back into the notebook's own objects.

    Tensors, arrays, dictionaries, lists and sets are changed in place, since an optimizer or a variable of
    the notebook may know them too. One that is met twice is changed once: where the training had put
    something else into one of the two places, that is replaced.
    """

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, Any, Any]] = {}
        self._addresses: dict[int, set[int]] = {}

    def restore(self, part: Any, saved: Any, name: str) -> None:
        """Give ``part`` the ``saved`` state. Raises ResumeError naming the part that does not fit."""
        if isinstance(part, dict) and isinstance(saved, Mapping):
            saved = {**saved, **{key: _AS_IT_IS for key in part if key not in saved}}
        if self.put(part, saved, name) is not part:
            raise ResumeError(
                f"the checkpoint does not fit {name} ({_described(part)}): it holds {_described(saved)}; "
                "resume with the same, or start fresh with resume=False"
            )

    def put(self, item: Any, saved: Any, name: str) -> Any:
        """``item`` with the ``saved`` state in it, or what belongs in its place. Raises ResumeError."""
        if saved is _AS_IT_IS or saved is item:
            return item
        if type(item) in _PLAIN:
            return saved
        if _is_object(item):
            self._load(item, saved, name)
            return item
        if _is_tensor(item) and _is_tensor(saved):
            return self._tensor(item, saved)
        if _is_array(item) and _is_array(saved):
            if item.shape == saved.shape and item.dtype == saved.dtype and item.flags.writeable:
                return self._copied(item, saved, item.ctypes.data, saved.ctypes.data)
            return saved
        if id(item) in self._done and not _holds_object(item):
            _, known, result = self._done[id(item)]
            return result if known is saved else saved
        result = self._container(item, saved, name)
        self._done[id(item)] = (item, saved, result)
        return result

    def _container(self, item: Any, saved: Any, name: str) -> Any:
        if isinstance(item, dict) and isinstance(saved, Mapping):
            new = {
                key: self.put(item[key], value, f"{name}[{key!r}]") if key in item else value
                for key, value in saved.items()
            }
            item.clear()
            for key, value in new.items():
                item[key] = value
        elif type(item) in (list, tuple) and isinstance(saved, (list, tuple)):
            return self._sequence(item, saved, name)
        elif type(item) is set and isinstance(saved, (set, frozenset)):
            item.clear()
            item.update(saved)
        elif type(item) is bytearray and isinstance(saved, (bytes, bytearray)):
            item[:] = saved
        elif type(item) is type(saved) and _keeps_all_in_its_attributes(item):
            # An estimator of scikit-learn's kind, saved whole: the notebook's own variable becomes it.
            vars(item).clear()
            vars(item).update(vars(saved))
        else:
            return saved
        return item

    def _load(self, item: Any, saved: Any, name: str) -> None:
        try:
            kind = _generator_kind(item)
            if isinstance(item, UserState):
                item.load_state_dict(saved, self)
            elif kind == "torch":
                item.set_state(saved.cpu())
            elif kind == "numpy":
                item.bit_generator.state = saved
            else:
                item.load_state_dict(saved)
                self._note_tensors(item, saved)
                _check_options(item)
        except ResumeError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise ResumeError(
                f"the checkpoint does not fit {name} ({type(item).__name__}): {' '.join(text)[:300]}; "
                "resume with the same, or start fresh with resume=False"
            ) from error

    def _note_tensors(self, item: Any, saved: Any) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(item, torch.nn.Module) or not isinstance(saved, Mapping):
            return
        addresses = {_address(value) for value in saved.values() if _is_tensor(value)}
        for tensor in (*item.parameters(), *item.buffers()):
            self._addresses.setdefault(_address(tensor), set()).update(addresses)

    def _tensor(self, item: Any, saved: Any) -> Any:
        if item.shape == saved.shape and item.dtype == saved.dtype and item.layout == saved.layout:
            try:
                return self._copied(item, saved, _address(item), _address(saved))
            except RuntimeError:  # one that cannot be written to: expanded, or made for inference only
                pass
        return saved.to(item.device)  # a save in the background has copied it to the CPU

    def _copied(self, item: Any, saved: Any, at: int, saved_at: int) -> Any:
        if at and saved_at not in self._addresses.setdefault(at, {saved_at}):
            return saved.to(item.device) if _is_tensor(item) else saved
        if _is_tensor(item):
            with sys.modules["torch"].no_grad():
                item.copy_(saved)
        else:
            item[...] = saved
        return item

    def _sequence(self, item: Any, saved: Any, name: str) -> Any:
        if len(item) != len(saved) and _holds_object(item):
            raise ResumeError(f"the checkpoint has {len(saved)} parts of {name}, the notebook {len(item)}")
        pairs = zip(item, saved, strict=False)
        new = [self.put(part, value, f"{name}[{i}]") for i, (part, value) in enumerate(pairs)]
        new += saved[len(new) :]
        if type(item) is list:
            item[:] = new
            return item
        same = len(new) == len(item) and all(one is other for one, other in zip(new, item, strict=True))
        return item if same else tuple(new)


def count_parameters(model: Any) -> int:
    """Numbers in a torch module, or in several; 0 for what has no ``parameters()``."""
    if isinstance(model, Mapping):
        return sum(count_parameters(part) for part in model.values())
    if not hasattr(model, "parameters"):
        return 0
    try:
        return sum(int(parameter.numel()) for parameter in model.parameters())
    except (TypeError, AttributeError):
        return 0


def _is_object(item: Any) -> bool:
    if isinstance(item, type):
        return False
    return (
        hasattr(item, "load_state_dict") or hasattr(item, "state_dict") or _generator_kind(item) is not None
    )


def _check_options(item: Any) -> None:
    """Raise ValueError for an optimizer that was given another one's state: torch takes it without a look,
    and fails, or steps otherwise, at the first step."""
    options, groups = getattr(item, "defaults", None), getattr(item, "param_groups", None)
    if not isinstance(options, dict) or not isinstance(groups, list):
        return
    missing = {name for name in options for group in groups if name not in group}
    if missing:
        raise ValueError(f"it is of another kind of optimizer, without {', '.join(sorted(missing))}")


def _state_of(item: Any) -> Any:
    kind = _generator_kind(item)
    if kind == "torch":
        return item.get_state()
    return item.bit_generator.state if kind == "numpy" else item.state_dict()


def _holds_object(item: Any, depth: int = 0) -> bool:
    if _is_object(item):
        return True
    parts = item.values() if isinstance(item, Mapping) else item if type(item) in (list, tuple) else ()
    return depth < MAX_DEPTH and any(_holds_object(part, depth + 1) for part in parts)


def _generator_kind(item: Any) -> str | None:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(item, getattr(torch, "Generator", ())):
        return "torch"
    if numpy is not None and isinstance(item, numpy.random.Generator):
        return "numpy"
    return None


def _is_tensor(item: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, getattr(torch, "Tensor", ()))


def _is_array(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(item) is getattr(numpy, "ndarray", None)


def _address(tensor: Any) -> int:
    try:
        return int(tensor.data_ptr())
    except RuntimeError:  # a layout without one place in memory
        return 0


def _keeps_all_in_its_attributes(item: Any) -> bool:
    """Whether another of its class becomes it by taking over its attributes."""
    kind = type(item)
    if not hasattr(item, "__dict__") or isinstance(item, type):
        return False
    if hasattr(item, "get_params"):
        return True
    bases = [base for base in kind.__mro__ if base is not object]
    if any("__reduce__" in vars(base) or "__reduce_ex__" in vars(base) for base in bases):
        return False  # stored as a name, as enums are, or with more than its attributes
    return all(base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__") for base in bases)


def _described(value: Any) -> str:
    text = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    shape = getattr(value, "shape", None)
    return text.removeprefix("builtins.") if shape is None else f"{text} of shape {tuple(shape)}"

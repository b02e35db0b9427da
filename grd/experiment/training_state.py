"""Taking the state out of the objects of a training, and putting it back into them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from grd.errors import ResumeError


def take(item: Any) -> Any:
    """The state of ``item``: of an object by ``state_dict()``, of containers part by part, else the value."""
    if hasattr(item, "state_dict"):
        return item.state_dict()
    kind = _generator_kind(item)
    if kind == "torch":
        return item.get_state()
    if kind == "numpy":
        return item.bit_generator.state
    if isinstance(item, Mapping):
        return {key: take(part) for key, part in item.items()}
    if type(item) in (list, tuple):
        return [take(part) for part in item] if type(item) is list else tuple(take(part) for part in item)
    return item


def put_back(item: Any, saved: Any, name: str) -> Any:
    """``item`` with the ``saved`` state in it; plain values are replaced by what is returned.

    Dictionaries are updated in place. Raises ResumeError naming the part that does not fit.
    """
    try:
        if hasattr(item, "load_state_dict"):
            item.load_state_dict(saved)
            return item
        kind = _generator_kind(item)
        if kind == "torch":
            item.set_state(saved.cpu())
            return item
        if kind == "numpy":
            item.bit_generator.state = saved
            return item
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ResumeError(
            f"the checkpoint does not fit {name} ({type(item).__name__}): {' '.join(text)[:300]}; "
            "resume with the same model, or start fresh with resume=False"
        ) from error
    if isinstance(item, dict) and isinstance(saved, Mapping):
        for key, value in saved.items():
            item[key] = put_back(item[key], value, f"{name}[{key!r}]") if key in item else value
        return item
    if type(item) in (list, tuple) and any(_is_object(part) for part in item):
        if len(item) != len(saved):
            raise ResumeError(f"the checkpoint has {len(saved)} parts of {name}, the notebook {len(item)}")
        pairs = zip(item, saved, strict=True)
        return type(item)(put_back(part, value, f"{name}[{i}]") for i, (part, value) in enumerate(pairs))
    if type(item) is type(saved) and hasattr(item, "get_params") and hasattr(item, "__dict__"):
        # An estimator of scikit-learn's kind, saved whole: the notebook's own variable becomes it.
        vars(item).clear()
        vars(item).update(vars(saved))
        return item
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(item, torch.Tensor) and isinstance(saved, torch.Tensor):
        return saved.to(item.device)  # a save in the background has copied it to the CPU
    return saved


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
    return hasattr(item, "load_state_dict") or _generator_kind(item) is not None


def _generator_kind(item: Any) -> str | None:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(item, getattr(torch, "Generator", ())):
        return "torch"
    if numpy is not None and isinstance(item, numpy.random.Generator):
        return "numpy"
    return None

"""Random number generators as data: captured, restored, and seeded for one purpose."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import xxhash


def capture() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators, as far as they are loaded.

    Only ints, floats, text, bytes and tensors. CUDA's are included once CUDA is initialised.
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": {"version": version, "state": list(numbers), "gauss": gauss}}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, key, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "key": key.astype("<u4").tobytes(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        }
    torch = _torch()
    if torch is not None:
        state["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` took, and import what it needs for that."""
    python = state.get("python")
    if python is not None:
        random.setstate((python["version"], tuple(python["state"]), python["gauss"]))
    saved = state.get("numpy")
    if saved is not None:
        import numpy

        key = numpy.frombuffer(saved["key"], dtype="<u4")
        numpy.random.set_state((saved["name"], key, saved["position"], saved["has_gauss"], saved["cached"]))
    if state.get("torch") is not None:
        import torch

        torch.set_rng_state(state["torch"].cpu())
        saved_cuda = state.get("cuda")
        if saved_cuda and torch.cuda.is_available() and len(saved_cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([item.cpu() for item in saved_cuda])


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of the CPU generators whose states in two captures are not the same."""
    names = {name for name in ("python", "numpy") if one.get(name) != other.get(name)}
    mine, its = one.get("torch"), other.get("torch")
    same = mine is its if mine is None or its is None else bool((mine.cpu() == its.cpu()).all())
    if not same:
        names.add("torch")
    return names


def _torch() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and hasattr(torch, "get_rng_state") else None


def derive(*parts: int | str) -> int:
    """A 63-bit seed that is a function of ``parts`` alone."""
    return int(xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())) >> 1


def seed_all(seed: int) -> None:
    """Seed the CPU generators of Python, numpy and torch, as far as they are loaded."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)
    torch = _torch()
    if torch is not None:
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed also visits every device: 65 times slower


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Whatever is drawn in the block, the global CPU generators go on afterwards as if nothing had been."""
    numpy, torch = sys.modules.get("numpy"), _torch()
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if torch is not None:
            torch.set_rng_state(torch_state)


def process_seed() -> int:
    """The seed of a loop nobody gave one: torch's, so that ``torch.manual_seed`` decides, else 0."""
    torch = _torch()
    return int(torch.initial_seed()) if torch is not None else 0

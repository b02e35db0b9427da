"""A loader's batches in an order, and with a randomness, that a resume can reproduce.

A torch DataLoader over a map-style dataset is rebuilt from its attributes: the order of an epoch is a
function of (seed, epoch), what is drawn while loading a sample one of (seed, epoch, index). So a position is
a number, and neither workers nor their count matter. Other iterables are replayed up to the position. Each
pass begins before the next batch is drawn, so that the generators can be put back in between.
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import xxhash

from grd.experiment import rng

_Key = tuple[int, int, int, Any]  # seed, epoch, number of the batch, its indices


class Steps(Protocol):
    """One pass over the batches of an epoch."""

    total: int | None
    refusal: str | None
    """Why this pass cannot be continued in its middle, or None."""

    owner: Any
    """What keeps a state from one pass to the next (``state_dict``, ``load_state_dict``), or None."""

    def begin(self, start: int, resumed: dict[str, Any] | None) -> Iterator[Any]:
        """The batches from number ``start`` on, none drawn yet; ``resumed`` is the `position` saved there."""

    def position(self) -> dict[str, Any]:
        """What `begin` needs besides the number to continue after a restart."""

    def is_inexact(self, saved_rng: dict[str, Any]) -> bool:
        """Whether what was skipped may have left other traces than at first; ``saved_rng``: from there on."""


def steps_of(loader: Iterable[Any], seed: int, epoch: int) -> Steps:
    """The way to go through ``loader`` in this epoch."""
    utils = sys.modules.get("torch.utils.data")
    if utils is not None and isinstance(loader, utils.DataLoader):
        if type(loader) is not utils.DataLoader and _has_state(loader):
            return _StatefulSteps(loader)
        if isinstance(loader.dataset, utils.IterableDataset):
            if loader.num_workers == 0 and _has_state(loader.dataset):
                return _StatefulSteps(loader, loader.dataset)
            return _PlainSteps(loader, "its IterableDataset tells no position (no state_dict, or workers)")
        refusal = _refusal(loader, utils)
        if refusal is not None:
            return _PlainSteps(loader, refusal)
        return _RebuiltSteps(loader, seed, epoch)
    if _has_state(loader):
        return _StatefulSteps(loader)
    return _ReplayedSteps(loader)


def _has_state(item: Any) -> bool:
    return hasattr(item, "state_dict") and hasattr(item, "load_state_dict")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _refusal(loader: Any, utils: Any) -> str | None:
    known = (
        utils.SequentialSampler, utils.RandomSampler, utils.SubsetRandomSampler, utils.WeightedRandomSampler,
        utils.distributed.DistributedSampler,
    )  # fmt: skip
    batch_sampler = loader.batch_sampler
    if batch_sampler is not None and type(batch_sampler) is not utils.BatchSampler:
        if not _has_state(batch_sampler) or _length(batch_sampler) is None:
            name = type(batch_sampler).__name__
            return (
                f"its batch_sampler {name} has no state_dict, or no length, so its order cannot be repeated"
            )
        return None
    sampler = loader.sampler if batch_sampler is None else batch_sampler.sampler
    is_fixed = isinstance(sampler, (list, tuple, range))
    if type(sampler) not in known and not is_fixed and not _has_state(sampler):
        return f"its sampler {type(sampler).__name__} has no state_dict, so its order cannot be repeated"
    return None


class _Exact:
    """A pass that skips nothing, or what leaves no traces."""

    def is_inexact(self, saved_rng: dict[str, Any]) -> bool:
        return False


class _PlainSteps(_Exact):
    """Batches as they come; only the start of the epoch can be resumed."""

    owner = None

    def __init__(self, loader: Any, refusal: str) -> None:
        self.loader = loader
        self.refusal: str | None = refusal
        self.total = _length(loader)

    def begin(self, start: int, resumed: dict[str, Any] | None) -> Iterator[Any]:
        return iter(self.loader)

    def position(self) -> dict[str, Any]:
        return {}


class _StatefulSteps(_Exact):
    """A loader, or its dataset, that knows its own position."""

    refusal: str | None = None

    def __init__(self, loader: Any, owner: Any = None) -> None:
        self.loader = loader
        self.owner: Any = loader if owner is None else owner
        self.total = _length(loader)

    def begin(self, start: int, resumed: dict[str, Any] | None) -> Iterator[Any]:
        if resumed is not None and "owner" in resumed:
            self.owner.load_state_dict(resumed["owner"])
            self.total = None if self.total is None else max(self.total, start)
        return iter(self.loader)

    def position(self) -> dict[str, Any]:
        return {"owner": self.owner.state_dict()}


class _ReplayedSteps:
    """Any other iterable: the first batches are drawn again and dropped.

    The randomness at the beginning of the pass is put back for that: an order that is drawn there comes
    again. What the loop itself drew between the batches does not, so that those that are dropped may differ.
    """

    refusal: str | None = None
    owner = None

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.total = _length(loader)
        self._at_start: dict[str, Any] | None = None
        self._after: list[dict[str, Any]] = []
        """After the first batch that is dropped, and after the last."""

    def begin(self, start: int, resumed: dict[str, Any] | None) -> Iterator[Any]:
        if resumed is not None and resumed.get("rng_at_start") is not None:
            rng.restore(resumed["rng_at_start"])
        self._at_start = rng.capture()
        iterator = iter(self.loader)
        for several in (min(start, 1), start - 1):
            for _ in itertools.islice(iterator, max(0, several)):
                pass
            self._after.append(rng.capture())
        return iterator

    def position(self) -> dict[str, Any]:
        return {"rng_at_start": self._at_start}

    def is_inexact(self, saved_rng: dict[str, Any]) -> bool:
        first, last = self._after
        return bool(rng.differing(first, last) & rng.differing(last, saved_rng))


class _RebuiltSteps(_Exact):
    """A torch DataLoader whose order and randomness depend on seed, epoch and index only."""

    def __init__(self, loader: Any, seed: int, epoch: int) -> None:
        self.loader = loader
        self.seed = seed
        self.epoch = epoch
        self.refusal: str | None = None
        self.total = _length(loader)
        self._source = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        stateful = self._source if _has_state(self._source) else getattr(self._source, "sampler", None)
        self.owner: Any = stateful if _has_state(stateful) else None
        self._order_hash = ""
        self._sampler_state: Any = None

    def begin(self, start: int, resumed: dict[str, Any] | None) -> Iterator[Any]:
        order = self._order(resumed)
        self.total = len(order)
        self._order_hash = str(xxhash.xxh3_64_hexdigest(repr(order).encode()))
        if resumed is not None and resumed.get("order") not in (None, self._order_hash):
            raise OrderChanged
        plan = [(self.seed, self.epoch, number, indices) for number, indices in enumerate(order)]
        rebuilt = _rebuilt(self.loader)
        rebuilt.sampler.plan = plan[start:]
        rebuilt.generator.manual_seed(rng.derive(self.seed, "workers", self.epoch))
        return iter(rebuilt)

    def position(self) -> dict[str, Any]:
        return {"order": self._order_hash, "sampler": self._sampler_state}

    def _order(self, resumed: dict[str, Any] | None) -> list[Any]:
        if self.owner is not None:
            if resumed is not None and resumed.get("sampler") is not None:
                self.owner.load_state_dict(resumed["sampler"])
            self._sampler_state = copy.deepcopy(self.owner.state_dict())
        order_seed = rng.derive(self.seed, "order", self.epoch)
        with rng.untouched(), _seeded_sampler(self._source, order_seed, self.epoch):
            rng.seed_all(order_seed)
            return list(self._source)


class OrderChanged(Exception):
    """The data are no longer in the order they were in when the checkpoint was written."""


class _seeded_sampler:
    """For a block, the sampler draws from a generator of its own that depends on the seed only."""

    def __init__(self, source: Any, seed: int, epoch: int) -> None:
        self.sampler = getattr(source, "sampler", source)
        self.seed = seed
        self.epoch = epoch

    def __enter__(self) -> None:
        import torch

        self.before = getattr(self.sampler, "generator", None)
        if hasattr(self.sampler, "generator"):
            self.sampler.generator = torch.Generator().manual_seed(self.seed)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)

    def __exit__(self, *_: object) -> None:
        if hasattr(self.sampler, "generator"):
            self.sampler.generator = self.before


class _Plan:
    """The sampler of a rebuilt loader: the batches that are still to come."""

    def __init__(self) -> None:
        self.plan: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)


class _Batches:
    """A dataset whose items are whole batches, loaded under a randomness of their own."""

    def __init__(self, dataset: Any, collate: Any, is_batched: bool) -> None:
        self.dataset = dataset
        self.collate = collate
        self.is_batched = is_batched

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)  # a worker_init_fn looks for the user's dataset here

    def __getitem__(self, key: _Key) -> Any:
        seed, epoch, number, indices = key
        with rng.untouched():
            if not self.is_batched:
                rng.seed_all(rng.derive(seed, epoch, "sample", indices))
                return self.collate(self.dataset[indices])
            if hasattr(self.dataset, "__getitems__"):
                rng.seed_all(rng.derive(seed, epoch, "batch", number))
                samples = self.dataset.__getitems__(indices)
            else:
                samples = []
                for index in indices:
                    rng.seed_all(rng.derive(seed, epoch, "sample", index))
                    samples.append(self.dataset[index])
            return self.collate(samples)


def _as_it_is(item: Any) -> Any:
    return item


_rebuilt_loaders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_COPIED = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


def _rebuilt(loader: Any) -> Any:
    """The rebuilt twin of ``loader``, kept until it dies or is changed: persistent workers stay."""
    made_of = [getattr(loader, name) for name in _COPIED]
    before, twin = _rebuilt_loaders.get(loader, (None, None))
    if before != made_of:
        import torch
        from torch.utils.data import DataLoader

        twin = DataLoader(
            _Batches(loader.dataset, loader.collate_fn, loader.batch_sampler is not None),
            batch_size=None,
            sampler=_Plan(),
            collate_fn=_as_it_is,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )
        _rebuilt_loaders[loader] = (made_of, twin)
    return twin

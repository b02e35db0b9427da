"""What a training has worked through: batches, and samples where the loader tells how many a batch holds."""

from __future__ import annotations

from typing import Any


class BatchSizes:
    """How many samples each batch of a loader holds, by its ``batch_size`` and how many it has in all."""

    def __init__(self, loader: Any) -> None:
        size = getattr(loader, "batch_size", None)
        self._size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
        self._whole: int | None = None
        if self._size is not None and not getattr(loader, "drop_last", False):
            lengths = (_length(getattr(loader, name, None)) for name in ("sampler", "dataset"))
            self._whole = next((length for length in lengths if length is not None), None)

    def of(self, number: int) -> int | None:
        """Samples in batch ``number``, from 0; None where the loader does not tell."""
        if self._size is None or self._whole is None:
            return self._size
        return max(0, min(self._size, self._whole - number * self._size))


class Count:
    """Of one attempt, all passes of it together; samples are unknown from the first batch that tells none."""

    def __init__(self) -> None:
        self._batches = 0
        self._samples: int | None = 0

    def add(self, samples: int | None) -> None:
        """One batch more."""
        self._batches += 1
        self._samples = None if samples is None or self._samples is None else self._samples + samples

    def told(self) -> dict[str, Any]:
        """What a progress event says of it."""
        return {"batches": self._batches, "samples": self._samples}


def _length(item: Any) -> int | None:
    try:
        return len(item)
    except TypeError:
        return None

"""How far a run is in MLflow: kept beside the run, so that nothing is sent twice or forgotten.

The run's own files are what waits to be sent; this only says up to where it was.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from grd.files import read_json, write_json
from grd.runs.folder import RunFolder

SCHEMA = "grd.mlflow/1"


@dataclass(kw_only=True)
class Shipped:
    """What one store has got of a run."""

    run_id: str | None = None
    """MLflow's id of the run there."""
    events_offset: int = 0
    """Byte of events.jsonl up to which metrics were sent."""
    samples_offsets: dict[str, int] = field(default_factory=dict)
    """The same of each attempt's resources.jsonl."""
    last_samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The sample that was sent last, by attempt."""
    samples: int = 0
    """Number of samples sent, and the step of the next one."""
    metrics: int = 0
    """Number of values sent."""
    parameters: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    refused: list[str] = field(default_factory=list)
    """What the store would not take, the first of them."""
    whole: int = 0
    """The attempt with whose end everything had arrived; 0 for none yet."""
    error: str | None = None
    """Why the last try failed; None if it did not."""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Shipped:
        """What `to_dict` gave; other grd's fields are dropped."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in known})


def load(folder: RunFolder) -> dict[str, Shipped]:
    """What each store has got, by URI; a file that cannot be read counts as none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        value = read_json(folder.mlflow)
        return {uri: Shipped.from_dict(each) for uri, each in value["stores"].items()}
    return {}


def store(folder: RunFolder, stores: dict[str, Shipped]) -> None:
    """Write it, not waiting for the disk. Raises OSError."""
    value = {"schema": SCHEMA, "stores": {uri: asdict(shipped) for uri, shipped in stores.items()}}
    write_json(folder.mlflow, value, durable=False)


def summary(folder: RunFolder, attempt: int) -> list[dict[str, Any]]:
    """For those who look, a store each: uri, run_id, metrics, refused (numbers), complete, error.

    ``complete``: everything has arrived, up to the end of ``attempt``, the run's newest.
    """
    return [
        {
            "uri": uri,
            "run_id": shipped.run_id,
            "metrics": shipped.metrics,
            "refused": len(shipped.refused),
            "complete": shipped.whole >= attempt,
            "error": shipped.error,
        }
        for uri, shipped in load(folder).items()
    ]

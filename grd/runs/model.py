"""The record of a run: what run.json holds, and its words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from grd import contract
from grd.errors import ConfigurationError


def now_iso() -> str:
    """The time now as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso(moment: float) -> str:
    """POSIX seconds as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(kw_only=True)
class Attempt:
    """One papermill execution of a run."""

    number: int
    lineage: int
    resume: bool
    state: str = contract.QUEUED
    cause: str | None = None
    detail: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    seconds: float = 0.0
    """Awake time (CLOCK_MONOTONIC) from the runner's start to its end."""
    parameters: dict[str, Any] = field(default_factory=dict)
    notebook_sha256: str | None = None
    cap: dict[str, Any] | None = None
    """What this attempt may take beside the record's timeout and budget: seconds, cause (of the end it would
    meet), grant, until_end (whether the grant's end is what bounds it), counted (whether the grant's log
    could be written); None without such a cap."""
    gpus: list[dict[str, Any]] | None = None
    """GPUs that were leased for it: gpu (the driver's number) and uuid; None without a lease."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What was changed against the attempt before: notebook, parameters, timeout, budget, from_epoch."""
    stop: dict[str, Any] | None = None
    """How a stop went: reason, stages with seconds since the request, killed."""
    cells: dict[str, int] = field(default_factory=dict)
    """Number of code cells by status at the end."""
    oom: str | None = None
    resources: dict[str, Any] | None = None
    """What the kernel and all it started used: peak memory and how it is known, processor time, bytes read
    and written, GPUs; None where nothing was sampled."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """Fields of another grd's attempt; kept as they are."""


@dataclass(kw_only=True)
class RunRecord:
    """What run.json holds. Times are ISO 8601 in UTC, durations seconds."""

    schema: str = contract.SCHEMA_RUN
    run_id: str
    name: str
    state: str = contract.QUEUED
    cause: str | None = None
    detail: str | None = None
    resumable: bool = False
    attempt: int = 1
    lineage: int = 1
    runner: dict[str, Any] | None = None
    """pid, started (clock ticks since boot), host, boot_id."""
    kernel_pid: int | None = None
    guardian_pid: int | None = None
    processes: dict[str, Any] = field(default_factory=dict)
    """Identities (as `runner`) of kernel, guardian and watcher while an attempt has them."""
    kernel_name: str | None = None
    language: str | None = None
    notebook: str
    notebook_sha256: str
    parameters: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    """The notebook's own values of the parameters it declares, where they are literals of JSON."""
    working_dir: str
    checkpoint_dir: str
    declared: list[str] = field(default_factory=list)
    """Which of timeout, checkpoint_dir, resume, and of the names about GPUs, the notebook declares."""
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    deadline: str | None = None
    timeout: float | None = None
    """Cap on one attempt as somebody typed it; None if nobody did."""
    budget: dict[str, Any] = field(default_factory=dict)
    """seconds (cap on all attempts together, or None), used_seconds, typed (--budget, or None), typed_timeout
    (--timeout, or None, without an agent's shorter ones), grant (its id), agreed: who agreed to it
    ("default": nobody yet; "typed", "grant", "allocation", "allowed")."""
    grace: float = contract.DEFAULT_GRACE_SECONDS
    start_timeout: float = contract.DEFAULT_START_TIMEOUT_SECONDS
    max_output: int = contract.DEFAULT_MAX_OUTPUT_BYTES
    """Bytes of output that the notebook of an attempt keeps."""
    checkpointing: dict[str, float] = field(default_factory=dict)
    """Settings the notebook's training loop hears of: max_lost_work (s), checkpoint_budget (bytes)."""
    checkpoint: dict[str, Any] | None = None
    """epoch, step, path of the newest checkpoint."""
    progress: dict[str, Any] | None = None
    """name, n, total, eta_seconds and its interval, per_second, steps_per_second."""
    estimate: dict[str, Any] | None = None
    """What was predicted before the start, what the first steps predicted, and what later predictions learn
    from: `grd.estimation.before.Before.to_record`. None for a run of a grd without estimates."""
    metrics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    resume_command: str | None = None
    mlflow: dict[str, Any] | None = None
    """Where it is sent: uri (None: what MLflow's environment says), experiment, interval (s); or None."""
    gpus: dict[str, Any] | None = None
    """GPUs to lease: count (None: nobody asked, one where the machine has any) and pool."""
    key: str | None = None
    """What made the start idempotent, or None."""
    retry: dict[str, Any] | None = None
    """How it is resumed by itself: max_attempts (counted from from_attempt), from_attempt, delay and longest
    (ceilings of the pauses, s), notebook_errors (whether those are retried); None if it is not."""
    on_end: str | None = None
    """Shell command the runner executes at the end of each attempt, or None."""
    batch: dict[str, Any] | None = None
    """id of the batch and the run's index in it (from 0), or None."""
    folder: str
    grd_version: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    unknown: dict[str, Any] = field(default_factory=dict)
    """Fields of another grd's record; kept as they are, and no field of run.json themselves."""

    @property
    def written_by_another_version(self) -> str | None:
        """What to say about a record whose schema is not this grd's; None for ours."""
        if self.schema == contract.SCHEMA_RUN:
            return None
        return (
            f"{self.run_id} was written by another version of grd ({self.schema}, this one knows "
            f"{contract.SCHEMA_RUN}): shown as far as it is understood"
        )

    def note_processes(self, found: dict[str, dict[str, Any]]) -> None:
        """Take down who executes the attempt: identities of kernel, guardian and watcher, or nobody."""
        self.processes = found
        self.kernel_pid = found["kernel"]["pid"] if "kernel" in found else None
        self.guardian_pid = found["guardian"]["pid"] if "guardian" in found else None

    @property
    def current(self) -> Attempt:
        """The newest attempt."""
        return self.attempts[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the fields."""
        value = asdict(self)
        value.update(value.pop("unknown"))
        for attempt in value["attempts"]:
            attempt.update(attempt.pop("unknown"))
        return value

    @classmethod
    def from_dict(cls, value: Any) -> RunRecord:
        """The record in ``value``, with the unknown fields of a newer grd. Raises ConfigurationError."""
        if not isinstance(value, dict):
            raise ConfigurationError(f"run.json holds a {type(value).__name__}, which is no grd run")
        schema = str(value.get("schema", ""))
        if not schema.startswith("grd.run/"):
            raise ConfigurationError(f"run.json has schema {schema!r}, which is no grd run")
        try:
            _check_kinds(value, checkpoint_dir=str, checkpointing=dict, attempts=list)
            attempts = [Attempt(**_sorted_out(Attempt, attempt)) for attempt in value.get("attempts", [])]
            return cls(**{**_sorted_out(cls, value), "attempts": attempts})
        except (TypeError, AttributeError) as error:
            raise ConfigurationError(f"run.json is incomplete: {error}") from None


_NAMES = {kind: frozenset(f.name for f in fields(kind)) - {"unknown"} for kind in (Attempt, RunRecord)}


def _check_kinds(value: dict[str, Any], **kinds: type[Any]) -> None:
    for name, kind in kinds.items():
        if name in value and not isinstance(value[name], kind):
            raise TypeError(f"{name} is a {type(value[name]).__name__}")


def _sorted_out(kind: type[Any], value: dict[str, Any]) -> dict[str, Any]:
    known = _NAMES[kind]
    kept = {name: item for name, item in value.items() if name in known}
    return {**kept, "unknown": {name: item for name, item in value.items() if name not in known}}


def seconds_left(record: RunRecord, cap: dict[str, Any] | None) -> tuple[float, str]:
    """How long an attempt with this ``cap`` may run in seconds, and the cause of the end it would meet.

    The smallest of ``timeout`` (one attempt), what the budget of all attempts has left, and ``cap``; where
    nobody has typed or agreed to anything, the default cap of all attempts together. It may be zero or less.
    """
    caps = []
    if record.timeout is not None:
        caps.append((record.timeout, contract.DEADLINE))
    total = record.budget.get("seconds")
    if total is not None:
        typed = record.budget.get("typed", total if record.budget.get("agreed") == "typed" else None)
        # What somebody typed is their own budget; anything else is as much as was agreed to.
        cause = contract.BUDGET if typed == total else contract.APPROVAL_REQUIRED
        caps.append((float(total) - float(record.budget.get("used_seconds") or 0.0), cause))
    if cap is not None:
        caps.append((float(cap["seconds"]), str(cap["cause"])))
    if not caps:
        raise ConfigurationError("run.json has neither timeout nor budget")
    return min(caps, key=lambda cap: cap[0])

"""The words both sides of the kernel share: environment names, states, causes, event kinds.

The runner speaks them on one side, the notebook (`grd.experiment`) on the other, and everything that
reads a run later. Nothing here has behaviour beyond classifying a word.
"""

from __future__ import annotations

from typing import Final

# --- environment of a kernel that grd started; without them grd.experiment is harmless -------------
ENV_RUN_ID: Final = "GRD_RUN_ID"
ENV_ATTEMPT: Final = "GRD_ATTEMPT"  # int, from 1
ENV_EVENTS: Final = "GRD_EVENTS"  # path of events.jsonl
ENV_STOP_FILE: Final = "GRD_STOP_FILE"  # path; the file exists once somebody asked to stop
ENV_FENCE: Final = "GRD_FENCE"  # path of a file that holds the newest attempt's number
ENV_CHECKPOINT_DIR: Final = "GRD_CHECKPOINT_DIR"  # the folder injected as `checkpoint_dir`
ENV_DEADLINE: Final = "GRD_DEADLINE"  # CLOCK_MONOTONIC seconds at which the stop begins; same boot only
ENV_MAX_LOST_WORK: Final = "GRD_MAX_LOST_WORK"  # seconds of training at risk between two checkpoints
ENV_CHECKPOINT_BUDGET: Final = "GRD_CHECKPOINT_BUDGET"  # bytes that a run's checkpoint versions may take
ENV_NONINTERACTIVE: Final = "GRD_NONINTERACTIVE"  # "1": nobody can answer a question
ENV_MARKER: Final = "GRD_PROCESS_MARKER"  # carried by every process of one attempt, so that all can be found
ENV_RUNNER: Final = "GRD_RUNNER"  # the run whose runner a process is, or stems from
ENV_REQUESTER: Final = "GRD_REQUESTER"  # "pid:start" of the process that started the kernel
ENV_GPUS: Final = "GRD_GPUS"  # "number:UUID,..." of the GPUs that were leased for the run
ENV_LEASES: Final = "GRD_LEASES"  # file descriptors of those leases, for the kernel's guardian only
ENV_KERNEL_GRACE: Final = "GRD_KERNEL_GRACE"  # seconds a kernel has to save once its requester is gone

EXCHANGE_PREFIX: Final = ".distributed-"
"""Of a folder that an attempt keeps while the processes of a distributed training tell each other things."""

NOT_FINITE: Final = "not finite"
"""What is shown of a metric that was NaN or infinite, for which JSON has only null."""

KERNEL_ENVIRONMENT: Final = (
    ENV_RUN_ID,
    ENV_ATTEMPT,
    ENV_EVENTS,
    ENV_STOP_FILE,
    ENV_FENCE,
    ENV_CHECKPOINT_DIR,
    ENV_DEADLINE,
    ENV_MARKER,
    ENV_REQUESTER,
    ENV_GPUS,
    ENV_LEASES,
    ENV_KERNEL_GRACE,
)

# --- parameters papermill injects where the notebook declares them ---------------------------------
INJECTED_PARAMETERS: Final = ("timeout", "checkpoint_dir", "resume")

# --- states ------------------------------------------------------------------------------------------
QUEUED: Final = "queued"
RUNNING: Final = "running"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
INTERRUPTED: Final = "interrupted"
DECLINED: Final = "declined"
CANCELLED: Final = "cancelled"
STATES: Final = (QUEUED, RUNNING, COMPLETED, FAILED, INTERRUPTED, DECLINED, CANCELLED)
ENDED_STATES: Final = (COMPLETED, FAILED, INTERRUPTED, DECLINED, CANCELLED)

# --- causes -------------------------------------------------------------------------------------------
NOTEBOOK_ERROR: Final = "notebook_error"
DEADLINE: Final = "deadline"
BUDGET: Final = "budget"
APPROVAL_REQUIRED: Final = "approval_required"
STOPPED: Final = "stopped"
SIGTERM: Final = "sigterm"
SIGINT: Final = "sigint"
SIGHUP: Final = "sighup"
KERNEL_DIED: Final = "kernel_died"
OUT_OF_MEMORY: Final = "out_of_memory"
RUNNER_LOST: Final = "runner_lost"
HOST_LOST: Final = "host_lost"
PREEMPTED: Final = "preempted"
REVOKED: Final = "revoked"
DISK_FULL: Final = "disk_full"
STORAGE: Final = "storage"
START_FAILED: Final = "start_failed"
CAUSES: Final = (
    NOTEBOOK_ERROR, DEADLINE, BUDGET, APPROVAL_REQUIRED, STOPPED, SIGTERM, SIGINT, SIGHUP, KERNEL_DIED,
    OUT_OF_MEMORY, RUNNER_LOST, HOST_LOST, PREEMPTED, REVOKED, DISK_FULL, STORAGE, START_FAILED,
)  # fmt: skip
FAILURE_CAUSES: Final = (NOTEBOOK_ERROR, START_FAILED)

# --- event kinds (events.jsonl) -------------------------------------------------------------------------
EVENT_STATE: Final = "state"  # state, cause
EVENT_CELL: Final = "cell"  # index, status, of
EVENT_PROGRESS: Final = "progress"  # name, n, total
EVENT_METRICS: Final = "metrics"  # values {name: number}, epoch|None, step|None
EVENT_CHECKPOINT: Final = "checkpoint"  # epoch, step|None, path, bytes, seconds
EVENT_STOP: Final = "stop"  # stage 0 (asked), 1, 2, 3; reason; action
EVENT_RESUME: Final = "resume"  # what was restored: epoch, step|None, path
EVENT_STAGE: Final = "stage"  # name, cached
EVENT_WARNING: Final = "warning"  # message
EVENT_RETRY: Final = "retry"  # state (waiting, over), why, seconds
EVENT_KINDS: Final = (
    EVENT_STATE, EVENT_CELL, EVENT_PROGRESS, EVENT_METRICS, EVENT_CHECKPOINT, EVENT_STOP, EVENT_RESUME,
    EVENT_STAGE, EVENT_WARNING, EVENT_RETRY,
)  # fmt: skip

EVENT_VERSION: Final = 1
"""Value of ``v`` in every event. An event is one JSON object a line:
``{"v": 1, "t": <POSIX seconds>, "pid": <int>, "attempt": <int>, "kind": <kind>, ...}``."""

SCHEMA_RUN: Final = "grd.run/1"

DEFAULT_TIMEOUT_SECONDS: Final = 600.0
LONG_RUNNING_SECONDS: Final = 600.0
DEFAULT_GRACE_SECONDS: Final = 30.0
DEFAULT_START_TIMEOUT_SECONDS: Final = 60.0
DEFAULT_MAX_OUTPUT_BYTES: Final = 100_000_000


def is_resumable(state: str, cause: str | None) -> bool:
    """Whether ``grd resume`` takes a run in this state without any change to it.

    Interruptions always; failures too, since the checkpoint survives them; completed runs only if
    something changed, which is for the caller to judge.
    """
    return state in (INTERRUPTED, FAILED)

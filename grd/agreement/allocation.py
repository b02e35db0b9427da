"""The scheduler's job that this process is in, and when it ends."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import datetime

SQUEUE_SECONDS = 10.0


def job_of(environment: Mapping[str, str]) -> str | None:
    """The id of the Slurm job, or None outside of one."""
    return environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID")


def end_of_job(environment: Mapping[str, str]) -> float | None:
    """When the job ends (POSIX seconds): SLURM_JOB_END_TIME, else what squeue says; None if nobody tells."""
    told = environment.get("SLURM_JOB_END_TIME")
    if told is not None and told.isdecimal():
        return float(told)
    job = job_of(environment)
    if job is None:
        return None
    try:
        said = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%e"],
            capture_output=True,
            text=True,
            timeout=SQUEUE_SECONDS,
            env=dict(environment),
        ).stdout.split()
        # local time without a zone; "N/A" where the job has no limit
        return datetime.fromisoformat(said[0]).timestamp()
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None

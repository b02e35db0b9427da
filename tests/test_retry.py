"""``--max-attempts``: runs that are resumed by themselves, and those that are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until

from grd import contract
from grd.runs.model import Attempt, RunRecord
from grd.runs.retry import Policy, decide, policy_of

PARAMETERS = "mode = 'dies once'\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
MODES = """
import os, signal, time
if mode == 'dies' or (mode == 'dies once' and not resume):
    os.kill(os.getpid(), signal.SIGKILL)
if mode == 'errs once' and not resume:
    raise ValueError('once')
if mode == 'sleeps once' and not resume:
    time.sleep(600)
print('through')
"""
SOON = {"GRD_RETRY_DELAY": "0.05"}
LATE = {"GRD_RETRY_DELAY": "1h", "GRD_RETRY_MAX_DELAY": "1h"}


def research(project: Project, mode: str, *options: str, late: bool = False) -> Any:
    if not (project.path / "modes.ipynb").exists():
        project.notebook("modes.ipynb", MODES, parameters=PARAMETERS)
    arguments = ("research", "modes.ipynb", "-p", "mode", mode, *options)
    return project.grd(*arguments, env=LATE if late else SOON)


def retriers(project: Project) -> list[psutil.Process]:
    """Living processes that would resume a run of this project."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if "grd.steps.retrier" in line and str(project.path) in " ".join(line):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_kernel_that_dies_is_resumed_by_itself_to_the_end(project: Project) -> None:
    done = research(project, "dies once", "--max-attempts", "3")
    assert done.code == 0, done.err
    assert "attempt 1 ended: kernel_died; the next attempt starts within" in done.err
    assert [(a["state"], a["cause"]) for a in project.record()["attempts"]] == [
        ("interrupted", "kernel_died"),
        ("completed", None),
    ]
    shown = project.grd("status", "last", "--json").json["retry"]
    assert (shown["max_attempts"], shown["made"], shown["state"]) == (3, 2, "over")
    assert [e["state"] for e in project.events() if e["kind"] == "retry"] == ["waiting"]
    wait_until(lambda: not retriers(project), "the retrier ends with the run")
    assert project.processes() == []


@pytest.mark.faults
def test_the_last_attempt_is_the_last_and_status_says_so(project: Project) -> None:
    started = research(project, "dies", "--max-attempts", "2", "--detach", "--json")
    assert started.code == 0, started.err
    waited = project.grd("wait", "last", "--json")
    assert waited.code == 75, waited.err
    record = project.record()
    assert (record["attempt"], record["state"], record["cause"]) == (2, "interrupted", "kernel_died")
    told = project.grd("status").out
    assert "none follows: 2 of 2 attempts are made" in told
    assert f"next: grd resume {record['run_id']}" in told
    # A person who resumes it begins to count again; without a number it goes on as it was started.
    assert project.grd("resume", "last", "-p", "mode", "none", env=SOON).code == 0
    assert project.record()["retry"]["from_attempt"] == 3


@pytest.mark.faults
def test_a_notebook_error_is_retried_only_where_that_was_asked(project: Project) -> None:
    failed = research(project, "errs once", "--max-attempts", "3")
    assert failed.code == 1
    assert "a notebook error would come again" in failed.out
    assert len(project.record()["attempts"]) == 1
    done = project.grd("resume", "last", "--max-attempts", "2", "--retry-errors", env=SOON)
    assert done.code == 0, done.err


def test_a_wait_for_the_next_attempt_is_told_and_can_be_stopped(project: Project) -> None:
    assert research(project, "dies", "--max-attempts", "2", "--detach", late=True).code == 0
    run = project.only_run()
    wait_until(lambda: (run / "retry.json").exists() and "waiting" in (run / "retry.json").read_text(), "it")
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["cause"], shown["retry"]["state"]) == (
        "interrupted", "kernel_died", "waiting",
    )  # fmt: skip
    assert shown["retry"]["next_at"] > shown["ended_at"]
    assert "attempt 2 of 2 starts by itself in" in project.grd("status").out
    assert project.grd("rm", run.name).code == 69
    assert project.grd("gc").code == 0
    assert project.grd("wait", "last", "--timeout", "0.5").code == 124
    began = time.monotonic()
    stopped = project.grd("stop", "last", "--json")
    assert stopped.code == 0, stopped.err
    assert time.monotonic() - began < LIMIT_SECONDS / 4
    assert stopped.json["runs"][0]["retry"]["why"] == "somebody asked it to stop (stopped)"
    wait_until(lambda: not retriers(project), "the retrier is gone")
    assert project.grd("wait", "last").code == 75
    assert project.grd("rm", run.name).code == 0


@pytest.mark.faults
def test_who_resumes_during_the_wait_need_not_wait(project: Project) -> None:
    assert research(project, "dies once", "--max-attempts", "3", "--detach", late=True).code == 0
    run = project.only_run()
    wait_until(lambda: (run / "retry.json").exists() and "waiting" in (run / "retry.json").read_text(), "it")
    assert project.grd("resume", "last").code == 0
    assert project.record()["attempt"] == 2
    wait_until(lambda: not retriers(project), "the retrier ends with the run")


@pytest.mark.faults
def test_a_deadline_is_gone_beyond_only_within_a_budget(project: Project) -> None:
    ended = research(project, "sleeps once", "--timeout", "6", "--grace", "1", "--max-attempts", "3")
    record = project.record()
    # Nobody typed a budget: what was allowed by the user's own file is one attempt of six seconds.
    assert (ended.code, record["cause"], record["attempt"]) == (75, "deadline", 1)
    assert "nobody agreed to more" in ended.out
    done = project.grd("resume", "last", "--budget", "300", "--max-attempts", "2", env=SOON)
    assert done.code in (0, 75), done.err  # a kernel may take longer than six seconds to start
    causes = [attempt["cause"] for attempt in project.record()["attempts"]]
    assert causes[:2] in (["deadline", None], ["deadline", "deadline"])
    assert len(causes) == (2 if causes[1] is None else 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-attempts", "0"), "--max-attempts: 0 is not between 1 and 100"),
        (("--max-attempts", "many"), "--max-attempts: 'many' is no whole number"),
        (("--retry-errors",), "--retry-errors needs --max-attempts 2 or more"),
    ],
)
def test_a_wrong_number_is_said_before_anything_starts(
    options: tuple[str, ...], said: str, project: Project
) -> None:
    done = research(project, "none", *options)
    assert (done.code, done.err) == (2, f"grd: {said}\n")
    assert project.run_folders() == []


def record_of(cause: str | None, attempt: int = 1, **budget: Any) -> RunRecord:
    state = contract.FAILED if cause in contract.FAILURE_CAUSES else contract.INTERRUPTED
    return RunRecord(
        run_id="r", name="r", notebook="n", notebook_sha256="0", working_dir="/", checkpoint_dir="/",
        created_at="2026-01-01T00:00:00Z", folder="/", attempt=attempt,
        state=contract.COMPLETED if cause is None else state, cause=cause, budget=budget,
        attempts=[Attempt(number=number, lineage=1, resume=number > 1) for number in range(1, attempt + 1)],
    )  # fmt: skip


@pytest.mark.parametrize("cause", [None, *contract.CAUSES])
def test_what_nobody_asked_for_is_retried_and_nothing_else(cause: str | None) -> None:
    policy = Policy(max_attempts=3, from_attempt=1, delay=4.0, longest=100.0)
    again = {"kernel_died", "out_of_memory", "runner_lost", "host_lost", "preempted", "disk_full", "storage"}
    decision = decide(record_of(cause), policy, asked=None, draw=lambda: 1.0)
    assert decision.pause == (4.0 if cause in again else None)
    assert decide(record_of(cause, 2), policy, asked=None, draw=lambda: 1.0).pause == (
        8.0 if cause in again else None
    )
    assert decide(record_of(cause, 3), policy, asked=None).pause is None
    assert decide(record_of(cause), policy, asked="stopped").pause is None


def test_what_was_agreed_decides_about_a_deadline() -> None:
    policy = Policy(max_attempts=3, from_attempt=1, delay=4.0, longest=100.0, notebook_errors=True)
    within = record_of("deadline", seconds=100.0, used_seconds=10.0)
    assert decide(within, policy, asked=None).pause == 0.0
    assert decide(record_of("deadline", seconds=100.0, used_seconds=100.0), policy, asked=None).pause is None
    assert decide(record_of("deadline", seconds=None, used_seconds=1.0), policy, asked=None).pause is None
    within.attempts[-1].cap = {"seconds": 9.0, "cause": "deadline", "grant": None, "counted": True}
    assert decide(within, policy, asked=None).pause is None, "the end of a scheduler's job"
    assert decide(record_of("notebook_error"), policy, asked=None).pause is not None


def test_attempts_are_counted_from_the_one_that_somebody_started(tmp_path: Path) -> None:
    policy = Policy(max_attempts=2, from_attempt=5, delay=1.0, longest=1.0)
    assert decide(record_of("kernel_died", 5), policy, asked=None).pause is not None
    assert decide(record_of("kernel_died", 6), policy, asked=None).pause is None
    assert policy_of(record_of("kernel_died")) is None

"""Fault x moment: whatever strikes a run, and whenever, the same invariants hold afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Project, cannot_be_had, wait_until
from disks import Disk, mounted
from invariants import (
    Before,
    known_processes,
    no_scraps,
    notebook_is_whole,
    nothing_is_alive,
    nothing_is_locked,
    record_and_events_agree,
)
from moments import (
    BEFORE_THE_FIRST_CELL,
    CLEANUP,
    MOMENTS,
    SAVED_WITHIN_SECONDS,
    children,
    prepare,
    release,
    said_before,
)
from strikes import FAULTS, SIGNALS, Fault, clock_environment, hang_up, now

pytestmark = pytest.mark.faults

ALL = {**FAULTS, **SIGNALS}
EVERY_MOMENT = (
    BEFORE_THE_FIRST_CELL,
    "silent cell",
    "printing cell",
    "5 MB of output being saved",
    "checkpoint being saved",
    CLEANUP,
)
STUBBORN = ("cell holding the GIL", "cell swallowing interrupts")
AGAINST_STUBBORN = (
    "kernel SIGKILL", "runner SIGTERM", "runner SIGINT", "runner SIGKILL", "runner SIGSTOP",
    "everyone SIGTERM", "deadline",
)  # fmt: skip

IMPOSSIBLE = {
    ("MemoryError", BEFORE_THE_FIRST_CELL),  # there is no cell to raise it
}
CASES = [
    *((fault, moment) for fault in FAULTS for moment in EVERY_MOMENT if (fault, moment) not in IMPOSSIBLE),
    *((fault, moment) for fault in AGAINST_STUBBORN for moment in STUBBORN),
    *((fault, "training") for fault in SIGNALS),
    *((fault, "training") for fault in ("runner SIGTERM", "runner SIGKILL", "deadline")),
    *((fault, "checkpoint being saved") for fault in SIGNALS if "twice" in fault),
]

MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
MEMORY_LIMIT_BYTES = 600_000_000
"""Room for a small checkpoint, and so little that it is soon free: until then the system kills the next."""


def expected_end(name: str, moment: str) -> tuple[str, set[str], int]:
    """State, causes that are true, and the exit code of the command that followed the run."""
    fault = ALL[name]
    if moment == CLEANUP and name != "runner SIGKILL":
        return "interrupted", {"stopped"}, 75  # that was asked first, and decides
    if moment == BEFORE_THE_FIRST_CELL and fault.kernel_alone:
        return "failed", {"start_failed"}, 69
    if fault.cause == "disk_full" and moment in ("silent cell", BEFORE_THE_FIRST_CELL):
        # nothing is lost while nothing is said; who stops it may find no room for the request itself
        return "interrupted", {"stopped", "sigterm", "disk_full"}, 75
    return fault.state, {fault.cause}, 1 if fault.state == "failed" else 75


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup of the test's own with a limit."""
    cgroup = MEMORY_CGROUP / f"grd-test-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT_BYTES))
    except OSError as error:
        cannot_be_had(f"a memory cgroup cannot be made here: {error}")
    try:
        yield cgroup
    finally:
        wait_until(lambda: not (cgroup / "cgroup.procs").read_text(), "the cgroup to be empty")
        cgroup.rmdir()


@pytest.fixture
def disk(request: pytest.FixtureRequest, project: Project, tmp_path: Path) -> Iterator[Disk | None]:
    """The file system that the fault strikes, with the project's runs on it."""
    kind = ALL[request.getfixturevalue("fault")].disk
    if kind is None:
        yield None
        return
    with mounted(kind, tmp_path / "disk") as made:
        (made.folder / "runs").mkdir()
        project.runs_dir.symlink_to(made.folder / "runs")
        yield made


def strike(fault: Fault, disk: Disk | None, project: Project, process: object, moment: str) -> None:
    """Let the fault happen, and what follows it where nothing else would end the run."""
    if disk is not None:
        disk.strike()
        release(project)
        if fault.cause == "disk_full" and moment in ("silent cell", BEFORE_THE_FIRST_CELL):
            stopped = project.grd("stop", "last")
            assert "Traceback" not in stopped.err, stopped.err
    else:
        fault.strike(project, process)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fault", "moment"), CASES)
def test_a_run_is_whole_and_resumable_after(
    project: Project, fault: str, moment: str, disk: Disk | None
) -> None:
    kind = ALL[fault]
    if kind.clock:
        project.environment |= clock_environment(project)
    if disk is not None or kind.memory_limit:
        project.environment |= {"CHECKPOINT_BYTES": "15_000_000", "GRD_CHECKPOINT_BUDGET": "40MB"}
    with memory_cgroup() if kind.memory_limit else contextlib.nullcontext() as cgroup:
        end_as_expected(project, fault, moment, disk, cgroup)
    if not kind.record_is_gone:
        for name in ("do-exit", "do-memory", "do-allocate"):
            (project.path / name).unlink(missing_ok=True)
        resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
        assert resumed.code == 0, resumed.err
        assert resumed.json["state"] == "completed"
        assert project.grd("logs", "last").out.endswith("the end\n")
        no_scraps(project.only_run())
    assert project.processes() == []


def end_as_expected(
    project: Project, fault: str, moment: str, disk: Disk | None, cgroup: Path | None
) -> None:
    """Start, reach the moment, strike, and check everything that can be seen afterwards."""
    kind = ALL[fault]
    prepare(project, moment)
    options = ("--timeout", kind.timeout, "--grace", MOMENTS[moment].grace)
    process = project.start("research", "run.ipynb", *options, cgroup=cgroup)
    MOMENTS[moment].reached(project)
    processes = known_processes(project, children(project))
    run, struck = project.only_run(), now()
    strike(kind, disk, project, process, moment)
    if not kind.kernel_alone:
        release(project)  # a kernel that dies of it must not get any further
    ended = project.finish(process)
    release(project)
    before = Before(run, processes, said_before(project, struck - SAVED_WITHIN_SECONDS))
    assert "Traceback" not in ended.err, ended.err
    if kind.record_is_gone:
        assert ended.code == 66, ended.err
        nothing_is_alive(project, before)
        assert project.run_folders() == []
        return
    state, causes, code = expected_end(fault, moment)
    if kind.strike is hang_up:
        code = -signal.SIGHUP
    assert ended.code == code, ended.err
    told = project.grd("status", run.name, "--json")
    assert (told.json["state"], told.json["cause"] in causes) == (state, True), told.json["cause"]
    nothing_is_alive(project, before)
    if disk is not None:
        disk.repair()
    record_and_events_agree(project, run, state, causes)
    nothing_is_locked(run)
    cells_ran = moment != BEFORE_THE_FIRST_CELL
    notebook_is_whole(run, before, cells_ran=cells_ran)


def test_a_clock_that_was_set_back_prolongs_nothing_and_no_duration_is_negative(project: Project) -> None:
    project.environment |= clock_environment(project)
    prepare(project, "silent cell")
    began = time.monotonic()
    process = project.start("research", "run.ipynb", "--timeout", "15s", "--grace", "5s")
    MOMENTS["silent cell"].reached(project)
    (project.path / "clock").write_text("-3600")
    ended = project.finish(process)
    assert ended.code == 75, ended.err
    record = project.record()
    assert record["ended_at"] < record["started_at"], "the clock was not set back: the test shows nothing"
    assert 14 < record["attempts"][0]["seconds"] < time.monotonic() - began
    assert record["budget"]["used_seconds"] == record["attempts"][0]["seconds"]

"""Agreeing to long runs as typed: by a person at a real terminal, and by commands that nobody sits at."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_SECONDS, Finished, Project, cannot_be_had, wait_until
from test_research import PARAMETERS, TRAIN

from grd.agreement import log as log_module
from grd.agreement.clock import now
from grd.agreement.log import AgreementLog

pytestmark = pytest.mark.faults

WAITS = """
import pathlib, time
from grd.experiment import training
for epoch in training.epochs(1000, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    for _ in epoch.steps(range(10)):
        time.sleep(0.05)
"""


@pytest.fixture
def strict(project: Project) -> Project:
    """A project whose user has not allowed headless commands to agree."""
    Path(project.environment["XDG_CONFIG_HOME"], "grd", "config.toml").unlink()
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    project.notebook("waits.ipynb", WAITS, parameters=PARAMETERS)
    return project


def at_terminal(project: Project, *arguments: str, typed: str = "") -> Finished:
    """Run ``grd ARGUMENTS`` with a terminal for input and messages, and type into it."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "grd", *arguments],
        cwd=project.path,
        env=project.environment | {"TERM": "dumb"},
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        start_new_session=True,
        text=True,
    )
    os.close(follower)
    said = bytearray()
    os.write(leader, typed.encode())

    def drain() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while True:
                said.extend(os.read(leader, 4096))

    import threading

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    reader.join(10)
    os.close(leader)
    return Finished(process.returncode, out, said.decode(errors="replace"))


def grant(project: Project, *options: str) -> dict[str, Any]:
    done = at_terminal(project, "approve", *options, "--json")
    assert done.code == 0, done.err
    return dict(done.json["grant"])


def log(project: Project) -> list[dict[str, Any]]:
    path = Path(project.environment["GRD_STATE_DIR"], "approvals.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("flag", ["--timeout", "--budget"])
def test_headless_more_than_the_threshold_is_refused_with_the_command_that_grants_it(
    strict: Project, flag: str
) -> None:
    refused = strict.grd("research", "train.ipynb", flag, "3h")
    assert refused.code == 77
    assert len(refused.err.strip().splitlines()) == 1
    assert "grd approve --max 3h --total 4h" in refused.err
    assert str(strict.path) in refused.err
    assert strict.run_folders() == []
    assert strict.grd("research", "train.ipynb", flag, "9m").code == 0


def test_the_command_that_is_named_grants_it(strict: Project) -> None:
    refused = strict.grd("research", "train.ipynb", "--timeout", "3h")
    command = refused.err.strip().split("grd approve", 1)[1].split()
    granted = grant(strict, *command)
    assert (granted["state"], granted["per_run_seconds"], granted["total_seconds"]) == ("valid", 10800, 14400)
    assert granted["by"]["how"] == "terminal"
    done = strict.grd("research", "train.ipynb", "--timeout", "3h", "--json")
    assert done.code == 0, done.err
    assert (done.json["budget"]["agreed"], done.json["budget"]["grant"]) == ("grant", granted["id"])
    used = strict.grd("approvals", "--json").json["grants"][0]
    assert 0 < used["used_seconds"] == pytest.approx(done.json["budget"]["used_seconds"], abs=0.01)
    assert [entry["kind"] for entry in log(strict)] == ["granted", "reserved", "used"]


def used_up(project: Project, seconds: float) -> dict[str, Any]:
    """The record of an interrupted run whose attempts have used ``seconds``."""
    started = project.grd("research", "waits.ipynb", "--detach", "--json")
    assert started.code == 0, started.err
    project.wait_for_event("progress", name="epochs")
    assert project.grd("stop", "last", "--now").code == 0
    file = project.run_folders()[-1] / "run.json"
    record = json.loads(file.read_text())
    record["budget"]["used_seconds"] = seconds
    file.write_text(json.dumps(record))
    return dict(record)


def test_the_command_that_is_named_for_a_resume_counts_what_was_used(strict: Project) -> None:
    (strict.path / "grd.toml").write_text('long_running_threshold = "5s"\n')
    used_up(strict, 4000)
    resume = ("resume", "last", "--timeout", "30s", "--detach")
    refused = strict.grd(*resume)
    assert refused.code == 77
    command = refused.err.strip().split("grd approve", 1)[1].split()
    grant(strict, *command)
    going = strict.grd(*resume)
    assert going.code == 0, going.err
    assert newest(strict)["budget"]["agreed"] == "grant"


def test_a_shorter_limit_of_an_agent_leaves_the_agreement_as_a_person_typed_it(strict: Project) -> None:
    (strict.path / "grd.toml").write_text('long_running_threshold = "5s"\n')
    typed = at_terminal(strict, "research", "waits.ipynb", "--timeout", "3h", "--detach")
    assert typed.code == 0, typed.err
    for options in (["--timeout", "8m"], [], ["--timeout", "9m"]):
        strict.wait_for_event("progress", name="epochs")
        assert strict.grd("stop", "last", "--now").code == 0
        record = strict.record()
        record["budget"]["used_seconds"] = 900.0
        (strict.only_run() / "run.json").write_text(json.dumps(record))
        resumed = strict.grd("resume", "last", "--detach", *options)
        assert resumed.code == 0, resumed.err
        budget = strict.record()["budget"]
        assert (budget["agreed"], budget["seconds"]) == ("typed", 10800.0)
    assert strict.grd("stop", "last", "--now").code == 0
    assert strict.grd("resume", "last", "--timeout", "4h").code == 77
    assert at_terminal(strict, "resume", "last", "--timeout", "4h", "--detach").code == 0
    budget = strict.record()["budget"]
    assert [budget[name] for name in ("agreed", "seconds", "typed_timeout")] == ["typed", None, 14400.0]
    assert strict.grd("stop", "last", "--now").code == 0


def test_a_budget_that_is_used_up_is_not_mended_by_a_grant(strict: Project) -> None:
    (strict.path / "grd.toml").write_text('long_running_threshold = "5s"\n')
    record = used_up(strict, 4 * 3600)
    refused = strict.grd("resume", "last", "--budget", "30s")
    assert refused.code == 77
    assert "give a longer --budget" in refused.err
    assert "grd approve" not in refused.err
    at_tty = at_terminal(strict, "resume", "last", "--budget", "30s")
    assert at_tty.code == 77
    assert f"grd resume {record['run_id']} --budget 8h" in at_tty.err


def test_only_a_person_grants_unless_the_users_own_file_allows_it(strict: Project) -> None:
    refused = strict.grd("approve")
    assert refused.code == 77
    assert "allow_noninteractive" in refused.err
    (strict.path / "grd.toml").write_text("[approval]\nallow_noninteractive = true\n")
    assert strict.grd("approve").code == 77, "a project's own file must not allow it"
    assert log(strict) == []
    user = Path(strict.environment["XDG_CONFIG_HOME"], "grd", "config.toml")
    user.write_text("[approval]\nallow_noninteractive = true\n")
    allowed = strict.grd("approve", "--total", "1h", "--json")
    assert allowed.code == 0, allowed.err
    assert allowed.json["grant"]["by"]["how"] == "config"


def test_what_the_users_own_file_agrees_to_is_written_down_and_given_once(strict: Project) -> None:
    user = Path(strict.environment["XDG_CONFIG_HOME"], "grd", "config.toml")
    user.write_text("[approval]\nallow_noninteractive = true\n")
    (strict.path / "grd.toml").write_text('long_running_threshold = "2s"\n')
    first = strict.grd("research", "waits.ipynb", "--timeout", "8s", "--grace", "20s", "--json")
    assert (first.code, first.json["cause"]) == (75, "deadline"), first.err
    (entry,) = log(strict)
    assert (entry["kind"], entry["timeout"], entry["by"]["how"]) == ("allowed", 8, "config")
    assert (entry["run"], entry["attempt"]) == (first.json["run_id"], 1)
    refused = strict.grd("resume", "last")
    assert refused.code == 77, "the 8 s are for all attempts together"
    assert "8s for all attempts" in refused.err
    assert len(log(strict)) == 1
    more = strict.grd("resume", "last", "--timeout", "9s", "--json")
    assert (more.code, more.json["cause"]) == (75, "deadline"), more.err
    assert [(entry["attempt"], entry["timeout"]) for entry in log(strict)] == [(1, 8), (2, 9)]
    assert "allowed run" in strict.grd("approvals", "--log").out


def test_what_a_person_types_at_a_terminal_is_the_agreement_and_is_written_down(strict: Project) -> None:
    done = at_terminal(strict, "research", "train.ipynb", "--timeout", "3h", "--json")
    assert done.code == 0, done.err
    assert done.json["budget"]["agreed"] == "typed"
    assert done.json["timeout"] == 10800
    (entry,) = log(strict)
    assert (entry["kind"], entry["timeout"], entry["by"]["how"]) == ("typed", 10800, "terminal")
    assert entry["by"]["tty"].startswith("/dev/")
    assert entry["place"]["notebook"].endswith("train.ipynb")


def test_a_terminal_that_says_that_nobody_is_there_is_none(strict: Project) -> None:
    strict.environment["GRD_NONINTERACTIVE"] = "1"
    assert at_terminal(strict, "research", "train.ipynb", "--timeout", "3h").code == 77
    assert at_terminal(strict, "approve").code == 77


def test_a_run_is_cut_at_its_grants_cap_and_says_what_to_type(strict: Project) -> None:
    grant(strict, "--max", "25s", "--total", "1h")
    cut = strict.grd("research", "waits.ipynb", "--grace", "20s", "--json")
    assert cut.code == 75, cut.err
    assert cut.json["cause"] == "approval_required"
    assert cut.json["checkpoint"] is not None
    assert 25 <= cut.json["budget"]["used_seconds"] < 60


def test_a_run_ends_with_its_grant_and_says_so(strict: Project) -> None:
    given = grant(strict, "--until", "20s", "--total", "1h")
    began = time.time()
    cut = strict.grd("research", "waits.ipynb", "--grace", "20s", "--json")
    assert cut.code == 75, cut.err
    assert cut.json["cause"] == "approval_required"
    assert cut.json["detail"] == f"grant {given['id']} has ended; a person types: grd approve"
    cap = cut.json["attempts"][0]["cap"]
    assert cap["seconds"] <= 20
    assert cap["until_end"] is True
    assert cut.json["checkpoint"] is not None
    assert time.time() - began < 60
    assert strict.grd("approvals", "--json").json["grants"][0]["state"] == "expired"
    assert [entry["kind"] for entry in log(strict)] == ["granted", "reserved", "used", "expired"]
    assert "expired" in strict.grd("approvals", "--log").out
    assert strict.grd("resume", "last", "--timeout", "1h").code == 77


def test_the_total_of_a_grant_holds_for_runs_at_once(strict: Project) -> None:
    (strict.path / "grd.toml").write_text('default_timeout = "9s"\n')  # what the third one gets
    given = grant(strict, "--max", "8s", "--total", "12s")
    started = [strict.start("research", "waits.ipynb", "--grace", "20s", "--json") for _ in range(3)]
    ended = [strict.finish(process) for process in started]
    caps = sorted(
        done.json["attempts"][0]["cap"]["seconds"]
        for done in ended
        if done.code == 75 and done.json["attempts"][0]["cap"]
    )
    assert len(caps) == 2, [done.err for done in ended]
    assert sum(caps) <= 12
    refused = [done for done in ended if done.code == 77]
    assert len(refused) + len([d for d in ended if d.code == 75]) == 3
    shown = strict.grd("approvals", "--json").json["grants"]
    assert [row["id"] for row in shown] == [given["id"]]


DIES = "import os, signal, time\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("batch", [False, True], ids=["run", "batch"])
def test_revoking_ends_a_retry_that_waits(strict: Project, batch: bool) -> None:
    """Also where the next grant would let it go on."""
    strict.notebook("dies.ipynb", DIES, parameters=PARAMETERS)
    late = {"GRD_RETRY_DELAY": "1h", "GRD_RETRY_MAX_DELAY": "1h"}
    command = ["sweep", "dies.ipynb", "--force", "-g", "epochs", "1"] if batch else ["research", "dies.ipynb"]
    where = "batches/*/events.jsonl" if batch else "*/retry.json"

    def pauses() -> list[float]:
        told = [path.read_text() for path in sorted(strict.runs_dir.glob(where))]
        if batch:
            return [float(found) for text in told for found in re.findall(r"is resumed in (\S+) s", text)]
        ends = [kept["next_at"] for kept in map(json.loads, told) if kept["next_at"]]
        return [datetime.fromisoformat(end).timestamp() - time.time() for end in ends]

    given = grant(strict, "--total", "5h")
    for number in range(1, 4):  # a pause is drawn at random
        started = strict.grd(*command, "--timeout", "1h", "--max-attempts", "3", "--detach", env=late)
        assert started.code == 0, started.err
        wait_until(lambda number=number: len(pauses()) >= number, "the wait for the next attempt")
        if pauses()[-1] > 120:
            break
    assert strict.grd("revoke", given["id"]).code == 0
    grant(strict, "--total", "6h")
    ended = strict.grd(*(["batch"] if batch else []), "wait", "last")
    assert ended.code == 75, ended.err
    told = strict.grd(*(["batch"] if batch else []), "status", "last").out
    assert len(strict.record(strict.run_folders()[-1])["attempts"]) == 1
    if not batch:
        assert f"none follows: grant {given['id']} was taken back" in told


def test_revoking_stops_a_run_gracefully_in_its_midst(strict: Project) -> None:
    given = grant(strict, "--total", "2h")
    process = strict.start("research", "waits.ipynb", "--timeout", "1h", "--json")
    strict.wait_for_event("progress", name="epochs")
    began = time.monotonic()
    revoked = strict.grd("revoke", given["id"])
    assert revoked.code == 0, revoked.err
    ended = strict.finish(process)
    assert ended.code == 75, ended.err
    assert (ended.json["state"], ended.json["cause"]) == ("interrupted", "revoked")
    assert ended.json["checkpoint"] is not None
    assert time.monotonic() - began < 60
    assert strict.grd("approvals", "--json").json["grants"][0]["state"] == "revoked"
    again = strict.grd("resume", "last")
    assert again.code == 77
    assert "grd approve" in again.err


def test_a_killed_runner_has_used_its_time_all_the_same(strict: Project) -> None:
    grant(strict, "--total", "2h")
    process = strict.start("research", "waits.ipynb", "--timeout", "1h")
    strict.wait_for_event("progress", name="epochs")
    os.kill(strict.record()["runner"]["pid"], signal.SIGKILL)
    strict.finish(process)
    wait_until(lambda: not strict.processes(), "the kernel's end")
    row = strict.grd("approvals", "--json").json["grants"][0]
    assert 0 < row["used_seconds"] < 600
    assert [entry["kind"] for entry in log(strict)] == ["granted", "reserved", "used"]


def test_a_grant_of_which_a_run_has_all_can_be_taken_back_with_all_others(strict: Project) -> None:
    given = grant(strict, "--total", "1h")
    assert strict.grd("research", "waits.ipynb", "--detach").code == 0
    strict.wait_for_event("progress", name="epochs")
    row = strict.grd("approvals", "--json").json["grants"][0]
    assert (row["state"], row["revocable"]) == ("in use", True)
    assert [row[f"{name}_seconds"] for name in ("left", "used", "reserved")] == [0, 0, 3600]
    refused = strict.grd("research", "waits.ipynb", "--timeout", "20m")
    assert refused.code == 77
    run = strict.record()["run_id"]
    assert f"reserved by {run} until" in refused.err and f"grd wait {run}" in refused.err
    assert "1h reserved by runs under way" in strict.grd("approvals").out
    assert f"grd revoke {given['id']}" in strict.grd("approvals").out
    revoked = strict.grd("revoke", "--all")
    assert revoked.code == 0, revoked.err
    assert given["id"] in revoked.out
    assert strict.grd("wait", "last").code == 75
    assert strict.record()["cause"] == "revoked"
    assert "no run uses one" in strict.grd("revoke", "--all").out
    assert strict.grd("approvals", "--json").json["grants"][0]["revocable"] is False


def test_a_run_ends_when_a_new_log_has_nothing_of_its_grant(strict: Project) -> None:
    given = grant(strict, "--total", "2h", "--max", "1h")
    assert strict.grd("research", "waits.ipynb", "--detach").code == 0
    strict.wait_for_event("progress", name="epochs")
    path = Path(strict.environment["GRD_STATE_DIR"], "approvals.jsonl")
    path.write_text(path.read_text().replace("7200.0", "72000.0"))
    for arguments in ([given["id"]], ["--all"]):
        refused = strict.grd("revoke", *arguments)
        assert refused.code == 69, refused.err
        assert "grd stop RUN" in refused.err
    assert strict.record()["state"] == "running", "a log that cannot be read says nothing"
    anew = at_terminal(strict, "approve", "--total", "2h", "--max", "1h")
    assert "runs that use one save and stop" in anew.err
    assert strict.grd("wait", "last").code == 75
    assert (strict.record()["state"], strict.record()["cause"]) == ("interrupted", "revoked")


def test_a_look_while_the_guardian_lets_the_kernel_save_settles_nothing(strict: Project) -> None:
    grant(strict, "--total", "1h", "--max", "30m")
    strict.notebook(
        "clings.ipynb",
        "import pathlib, time\npathlib.Path('begun').touch()\n"
        "while True:\n    try:\n        time.sleep(60)\n"
        "    except BaseException:\n        pathlib.Path('saving').touch()\n",
        parameters=PARAMETERS,
    )
    assert strict.grd("research", "clings.ipynb", "--grace", "8s", "--detach").code == 0
    wait_until((strict.path / "begun").exists, "its cell")
    began = time.monotonic()
    os.kill(strict.record()["runner"]["pid"], signal.SIGKILL)
    wait_until((strict.path / "saving").exists, "the guardian's request")
    row = strict.grd("approvals", "--json").json["grants"][0]
    assert (row["used_seconds"], row["reserved_seconds"]) == (0, 1800), "while the kernel still runs"
    wait_until(lambda: not strict.processes(), "the kernel's end")
    row = strict.grd("approvals", "--json").json["grants"][0]
    used = strict.grd("status", "last", "--json").json["budget"]["used_seconds"]
    assert 0 < used == pytest.approx(row["used_seconds"])
    assert row["used_seconds"] <= time.monotonic() - began + 60
    assert [entry["kind"] for entry in log(strict)] == ["granted", "reserved", "used"]


def test_an_edited_log_gives_nobody_anything_and_a_person_begins_a_new_one(strict: Project) -> None:
    grant(strict, "--total", "1h")
    path = Path(strict.environment["GRD_STATE_DIR"], "approvals.jsonl")
    path.write_text(path.read_text().replace("3600.0", "36000.0"))
    verified = strict.grd("approvals", "--verify")
    assert verified.code == 1
    assert "edited at entry 1" in verified.out
    refused = strict.grd("research", "train.ipynb", "--timeout", "30m")
    assert refused.code == 77
    assert "grd approvals --verify" in refused.err
    anew = at_terminal(strict, "approve", "--total", "1h")
    assert anew.code == 0, anew.err
    assert "new log" in anew.err
    assert strict.grd("approvals", "--verify").code == 0
    assert strict.grd("research", "train.ipynb", "--timeout", "30m").code == 0
    assert len(list(path.parent.glob("approvals.damaged-*.jsonl"))) == 1


def test_in_a_slurm_job_the_run_ends_before_the_job_does(strict: Project) -> None:
    end = int(time.time()) + 60 + 12 + 10
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_END_TIME": str(end)}
    cut = strict.finish(
        strict.start("research", "waits.ipynb", "--grace", "10s", "--timeout", "3h", "--json", env=job)
    )
    assert cut.code == 75, cut.err
    assert (cut.json["cause"], cut.json["budget"]["agreed"]) == ("deadline", "allocation")
    assert time.time() < end - 30
    (entry,) = log(strict)
    assert (entry["kind"], entry["job"], entry["ends"]) == ("allocation", "77", end)
    too_late = strict.grd(
        "research",
        "waits.ipynb",
        env={"SLURM_JOB_ID": "78", "SLURM_JOB_END_TIME": str(int(time.time()) + 60)},
    )
    assert too_late.code == 77
    assert "grd approve" not in too_late.err, "no grant makes the job longer"
    assert "ask the scheduler for more than" in too_late.err
    assert "--grace" not in too_late.err
    with_less_grace = strict.grd(
        "research",
        "train.ipynb",
        env={"SLURM_JOB_ID": "79", "SLURM_JOB_END_TIME": str(int(time.time()) + 85)},
    )
    assert with_less_grace.code == 77
    assert "give a --grace below" in with_less_grace.err


def test_a_state_folder_that_is_mounted_read_only_sees_and_uses_grants(strict: Project) -> None:
    given = grant(strict, "--total", "2h")
    state = strict.environment["GRD_STATE_DIR"]
    inside = (
        f"mount --bind '{state}' '{state}' && mount -o remount,bind,ro '{state}' && "
        f"exec '{sys.executable}' -m grd research train.ipynb --timeout 1h --json"
    )
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inside],
            cwd=strict.path,
            env=strict.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    except FileNotFoundError:
        cannot_be_had("no mount namespace can be made here")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        cannot_be_had(f"no mount namespace can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["budget"]["grant"] == given["id"]
    assert record["attempts"][0]["cap"]["counted"] is False


@pytest.mark.parametrize(
    "options",
    [
        ("--total", "nan"), ("--total", "inf"), ("--total", "-1h"), ("--total", "0"), ("--max", "0s"),
        ("--total", "0.0001s"), ("--max", "0.0001s"),
        ("--until", "25:00"), ("--until", "40d"), ("--until", "yesterday"), ("--everywhere", "--run", "last"),
        ("missing.ipynb",), ("--run", "nosuch"),
    ],
)  # fmt: skip
def test_a_grant_that_makes_no_sense_is_one_line_and_nothing_is_written(
    strict: Project, options: tuple[str, ...]
) -> None:
    refused = at_terminal(strict, "approve", *options)
    assert refused.code in (2, 66), refused.err
    assert "Traceback" not in refused.err
    assert log(strict) == []


def test_bytes_that_are_no_text_are_written_down_as_they_are(strict: Project) -> None:
    reason = os.fsdecode(b"f\xfcr")
    granted = at_terminal(strict, "approve", "--total", "1h", "--reason", reason, "--json")
    assert granted.code == 0, granted.err
    assert log(strict)[0]["reason"] == reason
    assert strict.grd("approvals", "--verify").code == 0
    elsewhere = Project(strict.path / reason, strict.environment)
    elsewhere.path.mkdir()
    elsewhere.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert at_terminal(elsewhere, "approve", "train.ipynb", "--total", "1h", "--json").code == 0
    done = elsewhere.grd("research", "train.ipynb", "--timeout", "30m", "--json")
    assert done.code == 0, done.err


def test_with_json_a_refusal_is_json_too(strict: Project) -> None:
    for arguments, code in (
        (("research", "train.ipynb", "--timeout", "3h"), 77), (("research", "train.ipynb", "--nosuch"), 2),
        (("status", "nosuch"), 66),
    ):  # fmt: skip
        refused = strict.grd(*arguments, "--json")
        said = [json.loads(line) for line in refused.err.splitlines()]
        assert (refused.code, refused.out) == (code, "")
        assert (said[-1]["kind"], said[-1]["code"]) == ("note", code)
        assert said[-1]["message"]


def test_revoke_and_approvals_name_what_is_not_there(strict: Project) -> None:
    assert strict.grd("revoke", "nosuch").code == 66
    assert strict.grd("revoke").code == 2
    assert "no grant is valid" in strict.grd("revoke", "--all").out
    assert "grd approve" in strict.grd("approvals").out
    assert strict.grd("approvals", "--verify").code == 0
    given = grant(strict, "--total", "1h", "--reason", "nightly")
    shown = strict.grd("approvals").out
    assert f"grd revoke {given['id']}" in shown
    assert "granted" in strict.grd("approvals", "--log").out
    assert strict.grd("revoke", "--all", "--json").json["grants"][0]["state"] == "revoked"


def test_a_mistyped_grant_leaves_a_damaged_log_where_it_lies(strict: Project) -> None:
    grant(strict, "--total", "1h")
    path = Path(strict.environment["GRD_STATE_DIR"], "approvals.jsonl")
    path.write_text(path.read_text().replace("3600.0", "36000.0"))
    for options in (("--max", "2x"), ("--until", "yesterday"), ("--until", "40d"), ("--total", "0")):
        refused = at_terminal(strict, "approve", *options)
        assert refused.code == 2, refused.err
    assert sorted(path.parent.glob("approvals.damaged-*.jsonl")) == []
    assert len(log(strict)) == 1


def test_a_state_folder_that_cannot_be_one_is_one_line(strict: Project) -> None:
    path = strict.path / "state-file"
    path.write_text("not a folder")
    strict.environment["GRD_STATE_DIR"] = str(path)
    refused = at_terminal(strict, "approve", "--total", "1h")
    assert refused.code == 69, refused.err
    assert "Traceback" not in refused.err
    assert "make its folder writable" in refused.err


def test_a_grant_given_after_the_clock_was_once_ahead_lasts_as_typed(
    strict: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = replace(now(), wall=time.time() + 3 * 86400, boot_id="an earlier one")
    monkeypatch.setattr(log_module, "now", lambda: ahead)
    AgreementLog(Path(strict.environment["GRD_STATE_DIR"])).append("declined", by={})
    done = at_terminal(strict, "approve", "--total", "1h", "--until", "2h", "--json")
    assert done.json["grant"]["state"] == "valid"
    assert "clock was ahead once" in done.err
    assert "3d" in done.err or "72h" in done.err
    assert strict.grd("research", "train.ipynb", "--timeout", "30m").code == 0


@pytest.fixture
def known(strict: Project) -> Project:
    """A project in which a short run has shown how long a long one would take."""
    strict.notebook(
        "steps.ipynb",
        "import time\nfrom grd.experiment import training\n"
        "for epoch in training.epochs(epochs, state={}, checkpoint_dir=checkpoint_dir, resume=resume):\n"
        "    time.sleep(seconds)\n    epoch.log(n=float(epoch))",
        parameters=PARAMETERS,
    )
    done = strict.grd("research", "steps.ipynb", "-p", "epochs", "4", "-p", "seconds", "0.5")
    assert done.code == 0, done.err
    return strict


LONG_RUN = ("research", "steps.ipynb", "-p", "epochs", "100000", "-p", "seconds", "0.5", "--detach", "--json")


def newest(project: Project) -> dict[str, Any]:
    record = json.loads((project.run_folders()[-1] / "run.json").read_text())
    assert project.grd("stop", record["run_id"], "--now").code == 0
    return dict(record)


def test_a_person_is_shown_the_estimate_and_asked_once(known: Project) -> None:
    asked = at_terminal(known, *LONG_RUN, typed="y\n")
    assert asked.code == 0, asked.err
    assert asked.err.count("y (yes, this run)") == 1
    assert asked.json["state"] in ("queued", "running")
    assert "may take long: about" in asked.err
    assert "scaled from epochs 4 to 100000" in asked.err
    record = newest(known)
    assert record["budget"]["agreed"] == "typed"
    assert record["budget"]["seconds"] >= record["estimate"]["high_seconds"]
    (entry,) = log(known)
    assert (entry["kind"], entry["estimate"]["method"]) == ("typed", record["estimate"]["method"])


def test_a_no_starts_nothing_and_is_written_down(known: Project) -> None:
    for typed in ("n\n", "\n", "what\never\nno\n"):
        before = known.run_folders()
        declined = at_terminal(known, *LONG_RUN, typed=typed)
        assert declined.code == 77, declined.err
        assert known.run_folders() == before
    assert [entry["kind"] for entry in log(known)] == ["declined"] * 3


def test_a_yes_to_an_absurd_estimate_agrees_to_ten_years_and_starts(known: Project) -> None:
    absurd = [word.replace("100000", "1" + 15 * "0") for word in LONG_RUN]
    asked = at_terminal(known, *absurd, typed="y\n")
    assert asked.code == 0, asked.err
    assert "a yes agrees to 87660h" in asked.err
    known.wait_for_event("progress", known.run_folders()[-1], name="epochs")
    record = newest(known)
    assert record["budget"]["seconds"] == 10 * 365.25 * 86400
    assert record["cause"] != "start_failed"


def test_capped_it_gets_what_nobody_needs_to_agree_to(known: Project) -> None:
    assert at_terminal(known, *LONG_RUN, typed="c\n").code == 0
    record = newest(known)
    assert (record["budget"]["agreed"], record["budget"]["seconds"]) == ("default", 600)
    assert log(known) == []


def test_a_time_is_taken_as_it_is_typed_and_a_session_is_a_grant(known: Project) -> None:
    assert at_terminal(known, *LONG_RUN, typed="soon\n2h\n").code == 0
    assert newest(known)["budget"]["seconds"] == 7200
    assert at_terminal(known, *LONG_RUN, typed="s\n").code == 0
    assert newest(known)["budget"]["agreed"] == "grant"
    again = at_terminal(known, *LONG_RUN)  # nobody is asked again in this session
    assert again.code == 0, again.err
    assert "yes, this run" not in again.err
    assert newest(known)["budget"]["agreed"] == "grant"


def test_where_nobody_is_a_long_estimate_starts_with_the_default_cap(known: Project) -> None:
    started = known.grd(*LONG_RUN)
    assert started.code == 0, started.err
    record = newest(known)
    assert record["estimate"]["high_seconds"] > 600
    assert (record["budget"]["agreed"], record["budget"]["seconds"]) == ("default", 600)

"""The index of runs: many runs are listed at once, and never otherwise than their folders say."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project, wait_until

from grd import contract
from grd.errors import ConfigurationError
from grd.files import take_lock
from grd.runs import handover, listing, store
from grd.runs.folder import RunFolder
from grd.runs.index import Row, RunIndex, Stamp
from grd.runs.model import Attempt, RunRecord, now_iso
from grd.runs.processes import identity

MANY = listing.FEWEST_INDEXED + 20
ROOT = Path(__file__).resolve().parents[1]


def write_run(runs_dir: Path, number: int, state: str = contract.COMPLETED) -> RunFolder:
    """A run with its record, as one that was run leaves it."""
    folder = RunFolder(runs_dir / f"20261123-{number:06d}-many-{number % 65536:04x}")
    folder.attempt(1).path.mkdir(parents=True)
    save(folder, state)
    return folder


def save(folder: RunFolder, state: str) -> None:
    """Replace the record as a runner does."""
    ended = state in contract.ENDED_STATES
    record = RunRecord(
        run_id=folder.run_id,
        name="many",
        state=state,
        runner=identity(),
        notebook="many.ipynb",
        notebook_sha256="0" * 64,
        working_dir=str(folder.path),
        checkpoint_dir=str(folder.checkpoints),
        created_at=now_iso(),
        started_at=now_iso(),
        ended_at=now_iso() if ended else None,
        timeout=3600.0,
        folder=str(folder.path),
        attempts=[Attempt(number=1, lineage=1, resume=False, state=state, started_at=now_iso())],
    )
    store.save(folder, record, durable=False)


@pytest.fixture
def many(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with more runs than are read one by one: one in ten failed, one in ten interrupted."""
    monkeypatch.setenv("GRD_STATE_DIR", project.environment["GRD_STATE_DIR"])
    states = [contract.FAILED, contract.INTERRUPTED, *[contract.COMPLETED] * 8]
    for number in range(MANY):
        write_run(project.runs_dir, number, states[number % 10])
    return project


def states_of(project: Project) -> dict[str, str]:
    """What is listed, by run id."""
    return {entry.folder.run_id: entry.state for entry in listing.list_all(project.runs_dir)}


def states_on_disk(project: Project) -> dict[str, str]:
    """What the folders say."""
    return {folder.run_id: record.state for folder, record in store.load_all(project.runs_dir)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which records were read."""
    seen: list[str] = []
    load = store.load

    def counted(folder: RunFolder) -> RunRecord:
        seen.append(folder.run_id)
        return load(folder)

    monkeypatch.setattr(store, "load", counted)
    return seen


def test_the_second_look_reads_no_record_of_a_run_that_has_ended(many: Project, reads: list[str]) -> None:
    first = states_of(many)
    assert len(reads) == MANY
    reads.clear()

    assert states_of(many) == first == states_on_disk(many)
    assert reads == sorted(first, reverse=True)  # those of the comparison: the listing read none


def test_commands_show_the_same_with_the_index_and_without_and_it_is_not_in_the_project(
    many: Project,
) -> None:
    before = sorted(path.name for path in many.path.rglob("*"))
    without = many.grd("list", "--json", "--state", "failed", "--limit", "5")
    state_dir = Path(many.environment["GRD_STATE_DIR"])
    assert [path.suffix for path in (state_dir / "index").iterdir()] == [".sqlite3"]

    listed = many.grd("list", "--json", "--state", "failed", "--limit", "5")
    overview = many.grd("status", "--json").json

    assert listed.json == without.json
    assert (listed.json["total"], len(listed.json["runs"])) == (MANY // 10, 5)
    assert len(overview["failed"]) == len(overview["resumable"]) == MANY // 10
    assert overview["completed"] == MANY - 2 * (MANY // 10)
    assert sorted(path.name for path in many.path.rglob("*")) == before


def test_runs_that_come_change_and_go_are_shown_as_the_folders_have_them(
    many: Project, reads: list[str]
) -> None:
    ids = sorted(states_of(many))
    write_run(many.runs_dir, 90_000, contract.FAILED)  # as from another host
    save(RunFolder(many.runs_dir / ids[1]), contract.COMPLETED)  # it was interrupted
    save(RunFolder(many.runs_dir / ids[2]), contract.FAILED)  # it was completed
    shutil.rmtree(many.runs_dir / ids[3])
    (many.runs_dir / ids[4] / "run.json").write_text("{")  # damaged: hides its own run and no other
    (many.runs_dir / ids[5]).rename(many.runs_dir / "20261123-999999-renamed-0000")
    reads.clear()

    shown = states_of(many)
    read = set(reads)

    assert shown == states_on_disk(many)
    assert shown["20261123-090000-many-5f90"] == contract.FAILED
    assert (shown[ids[1]], shown[ids[2]]) == (contract.COMPLETED, contract.FAILED)
    assert not {ids[3], ids[4], ids[5]} & shown.keys()
    assert len(read) == 5
    rows = RunIndex().rows(many.runs_dir)
    assert {name: row.state for name, row in rows.items()} == shown


def test_a_record_changed_in_place_without_a_new_time_is_still_found(many: Project) -> None:
    ids = sorted(states_of(many))
    path = many.runs_dir / ids[0] / "run.json"
    found = path.stat()
    path.write_text(path.read_text().replace('"state": "failed"', '"state": "cancelled"', 1))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as rsync and backups do

    assert states_of(many)[ids[0]] == contract.CANCELLED


def test_a_run_that_was_seen_running_is_looked_at_anew_each_time(many: Project) -> None:
    run = write_run(many.runs_dir, 90_000, contract.RUNNING)
    lock = take_lock(run.lock)
    assert lock is not None
    for _ in range(2):
        assert states_of(many)[run.run_id] == contract.RUNNING
    assert run.run_id not in RunIndex().rows(many.runs_dir)

    os.close(lock)  # as its death does

    assert states_of(many)[run.run_id] == contract.INTERRUPTED
    assert store.load(run).cause == contract.RUNNER_LOST


def test_a_resumed_run_is_not_shown_as_it_once_ended(many: Project) -> None:
    run = RunFolder(many.runs_dir / min(states_of(many)))
    assert states_of(many)[run.run_id] == contract.FAILED
    save(run, contract.RUNNING)
    lock = take_lock(run.lock)
    assert lock is not None
    try:
        assert states_of(many)[run.run_id] == contract.RUNNING
        assert run.run_id in {record.run_id for record in overview_of(many).running}
    finally:
        os.close(lock)


def overview_of(project: Project) -> handover.Overview:
    """What ``grd status`` groups."""
    return handover.overview_of(listing.list_all(project.runs_dir))


def be_garbage(state_dir: Path) -> None:
    RunIndex().path.write_bytes(b"not a database at all" * 1000)


def be_cut(state_dir: Path) -> None:
    path = RunIndex().path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def be_a_folder(state_dir: Path) -> None:
    RunIndex().path.unlink()
    RunIndex().path.mkdir()


def be_without_tables(state_dir: Path) -> None:
    with sqlite3.connect(RunIndex().path) as database:
        database.execute("DROP TABLE runs")


def be_unwritable(state_dir: Path) -> None:
    shutil.rmtree(state_dir)
    state_dir.write_text("a file where a folder should be")


@pytest.mark.parametrize("harm", [be_garbage, be_cut, be_a_folder, be_without_tables, be_unwritable])
def test_a_useless_index_costs_time_and_nothing_else(many: Project, harm: Callable[[Path], None]) -> None:
    expected = states_of(many)
    harm(Path(many.environment["GRD_STATE_DIR"]))

    assert states_of(many) == expected
    save(RunFolder(many.runs_dir / min(expected)), contract.COMPLETED)
    assert states_of(many) == states_on_disk(many)


def test_a_python_without_sqlite_reads_the_folders(many: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = states_of(many)
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    assert states_of(many) == expected
    RunIndex().delete()
    assert states_of(many) == expected
    assert not RunIndex().path.exists()


def test_a_command_says_nothing_of_a_broken_index_and_makes_it_anew(many: Project) -> None:
    many.grd("list")
    be_garbage(Path(many.environment["GRD_STATE_DIR"]))

    listed = many.grd("list", "--json", "--limit", str(MANY))

    assert (listed.code, listed.err) == (0, "")
    assert {run["run_id"]: run["state"] for run in listed.json["runs"]} == states_on_disk(many)
    assert len(RunIndex().rows(many.runs_dir)) == MANY


def test_somebody_who_holds_the_index_for_ever_holds_up_nobody(many: Project) -> None:
    expected = states_of(many)
    holder = sqlite3.connect(RunIndex().path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        save(RunFolder(many.runs_dir / min(expected)), contract.COMPLETED)
        assert states_of(many) == states_on_disk(many)
        assert not RunIndex(wait_seconds=0.0).note(many.runs_dir, {})
    finally:
        holder.close()
    assert RunIndex().path.exists()


def test_a_newer_grds_index_is_left_alone_and_an_older_one_made_anew(many: Project) -> None:
    expected = states_of(many)
    path = RunIndex().path
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    assert states_of(many) == expected
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)
        database.execute("PRAGMA user_version = 0")
    assert states_of(many) == expected
    assert len(RunIndex().rows(many.runs_dir)) == MANY


def test_few_runs_need_no_index(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRD_STATE_DIR", project.environment["GRD_STATE_DIR"])
    write_run(project.runs_dir, 1)
    assert len(states_of(project)) == 1
    assert not RunIndex().path.exists()


def test_runs_of_a_folder_that_is_gone_are_forgotten(many: Project, tmp_path: Path) -> None:
    index = RunIndex()
    gone = tmp_path / "gone"
    gone.mkdir()
    assert index.note(gone, {"run": Row(Stamp(1, 2, 3, 4), contract.FAILED)})
    assert index.rows(gone)
    gone.rmdir()
    states_of(many)
    assert not index.rows(gone)


def test_a_run_that_goes_between_the_list_and_its_record_is_left_out(many: Project) -> None:
    states_of(many)
    entries = listing.list_all(many.runs_dir)
    shutil.rmtree(entries[0].folder.path)
    (entries[1].folder.record).write_text("{")
    shown = [folder.run_id for folder, _ in listing.records(entries[:3])]
    assert shown == [entries[2].folder.run_id]
    with pytest.raises(ConfigurationError):
        entries[1].record()


def test_what_is_no_file_is_no_record(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(folder / "run.json")
    assert listing.list_all(tmp_path) == []


def test_a_writer_waits_where_sqlite_does_not(tmp_path: Path) -> None:
    """A database that is being made by another is not in WAL mode yet, and cannot be put into it meanwhile:
    SQLite then refuses at once, whatever its timeout is."""
    path = tmp_path / "i.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (x)")
    other.execute("BEGIN IMMEDIATE")
    leave = threading.Timer(0.5, other.execute, ["COMMIT"])
    leave.start()
    row = Row(Stamp(1, 2, 3, 4), contract.FAILED)
    assert not RunIndex(path, wait_seconds=0.0).note(tmp_path, {"run": row})
    assert RunIndex(path, wait_seconds=60.0).note(tmp_path, {"run": row})
    leave.join()
    other.close()
    assert RunIndex(path).rows(tmp_path) == {"run": row}


WRITER = """
import sys
from pathlib import Path
from grd import contract
from grd.runs.index import Row, RunIndex, Stamp

path, place, writer, transactions = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
index = RunIndex(path, wait_seconds=60.0)
failed = 0
for number in range(transactions):
    row = Row(Stamp(number, number, number, number), contract.COMPLETED)
    failed += not index.note(place, {f"{writer}-{number}": row, "shared": row}, ["nobody"])
print(failed)
"""


@pytest.mark.faults
def test_twenty_writers_lose_nothing_and_a_killed_one_damages_nothing(tmp_path: Path) -> None:
    path, place = tmp_path / "index" / "i.sqlite3", tmp_path / "runs"

    def write(writer: int, transactions: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(place), str(writer), str(transactions)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    victim = write(99, 10**9)
    wait_until(lambda: len(RunIndex(path).rows(place)) > 20, "the victim writes")
    writers = [write(number, 200) for number in range(20)]
    wait_until(lambda: any(name.startswith("7-") for name in RunIndex(path).rows(place)), "they all write")
    victim.kill()
    victim.communicate(timeout=30)

    assert [writer.communicate(timeout=240)[0].strip() for writer in writers] == ["0"] * 20
    rows = RunIndex(path).rows(place)
    assert {f"{writer}-{number}" for writer in range(20) for number in range(200)} <= rows.keys()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_state_page_shows_the_newest_and_counts_the_rest(
    many: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "MOST_SHOWN", 5)
    whole = handover.state_section(handover.overview_of(listing.list_all(many.runs_dir)))
    assert whole.count("- and 7 more: `grd list`") == 2
    read: list[Path] = []
    load = store.load
    monkeypatch.setattr(store, "load", lambda folder: read.append(folder) or load(folder))
    for most in (MANY, 10):  # the index knows the second time
        read.clear()
        handover.write_state_page(many.runs_dir)
        assert len(read) <= most + 10
        assert whole in (many.path / ".planning" / "STATE.md").read_text()

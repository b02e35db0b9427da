"""The log of agreements, the clock it counts by, and what is decided from both; nothing runs here."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import cannot_be_had
from hypothesis import given
from hypothesis import strategies as st

from grd.agreement import book as book_module
from grd.agreement import chain, decision
from grd.agreement import log as log_module
from grd.agreement.book import Book
from grd.agreement.chain import check
from grd.agreement.clock import Moment, now, true_time
from grd.agreement.decision import Facts, decide
from grd.agreement.grants import Place, Scope, replay
from grd.agreement.log import AgreementLog
from grd.errors import ConfigurationError, ResourceUnavailable, UsageError
from grd.runs.folder import RunFolder

HERE = Place(project="/home/ada/digits", notebook="/home/ada/digits/train.ipynb", run_id="r1")
BY = {"user": "ada", "how": "terminal"}


def book(folder: Path) -> Book:
    return Book(folder / "state")


def give(into: Book, scope: Scope | None = None, **values: float) -> Any:
    caps = {"per_run": 100.0, "total": 250.0, "ends": now().wall + 3600, **values}
    return into.grant(scope or Scope(kind="project", value="/home/ada/digits"), by=BY, **caps)


def run(folder: Path, name: str = "r1") -> RunFolder:
    return RunFolder(folder / name)


# --- the log


def test_entries_are_chained_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    mine.log.append("declined", by=BY)
    read = mine.log.read()
    assert [entry["kind"] for entry in read.entries] == ["granted", "declined"]
    assert read.problem is None
    assert read.entries[1]["prev"] == read.entries[0]["hash"]
    assert oct(mine.log.path.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("begun", [False, True], ids=["first entry", "later entry"])
def test_on_a_full_disk_what_is_told_as_failed_does_not_count(tmp_path: Path, begun: bool) -> None:
    """A file system without room for another file still has room in the last block of the log."""
    options = "size=1m,nr_inodes=6"
    mounted = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        cannot_be_had("a small file system needs the right to mount one")
    try:
        mine = book(tmp_path)
        mine.log.path.parent.mkdir()
        if begun:
            give(mine)
        else:
            for name in ("approvals.jsonl", "approvals.lock"):
                (mine.log.path.parent / name).touch(mode=0o600)
        with pytest.raises(OSError, match="No space left"):
            for number in range(9):
                (tmp_path / str(number)).touch()
        if begun:
            second = give(mine)
            mine.revoke(second.id, BY)
            assert [grant.revoked_at is None for grant in mine.ledger()[0].grants.values()] == [True, False]
        else:
            with pytest.raises(ResourceUnavailable, match="make room there"):
                give(mine)
            assert mine.ledger() == (replay(()), None)
        (tmp_path / "0").unlink()
        third = give(mine)
        grants, problem = mine.ledger()[0].grants, mine.ledger()[1]
        assert problem is None and third.id in grants and len(grants) == (3 if begun else 1)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_edited_entry_is_noticed_and_no_grant_counts(tmp_path: Path, number: int) -> None:
    mine = book(tmp_path)
    for _ in range(3):
        give(mine)
    lines = mine.log.path.read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace('"total": 250.0', '"total": 99999.0')
    mine.log.path.write_text("".join(lines))
    assert f"edited at entry {number + 1}" in str(mine.log.read().problem)
    assert mine.find(HERE) is None
    with pytest.raises(ResourceUnavailable, match="grd approvals --verify"):
        mine.log.append("declined", by=BY)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_log_that_was_cut_off_is_noticed(tmp_path: Path, kept: int) -> None:
    mine = book(tmp_path)
    for _ in range(3):
        give(mine)
    lines = mine.log.path.read_text().splitlines(keepends=True)
    mine.log.path.write_text("".join(lines[:kept]))
    assert "cut off" in str(mine.log.read().problem)
    assert mine.find(HERE) is None


def test_an_entry_that_was_taken_out_and_a_log_that_is_gone_are_noticed(tmp_path: Path) -> None:
    mine = book(tmp_path)
    for _ in range(3):
        give(mine)
    whole = mine.log.path.read_text()
    lines = whole.splitlines(keepends=True)
    mine.log.path.write_text(lines[0] + lines[2])
    assert "edited at entry 2" in str(mine.log.read().problem)
    mine.log.path.write_text(whole)
    assert mine.log.read().problem is None
    mine.log.path.unlink()
    assert "is gone" in str(mine.log.read().problem)


def test_the_count_beside_the_log_is_missed_too(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    give(mine)
    (tmp_path / "state" / "approvals.head.json").unlink()
    assert "is gone" in str(mine.log.read().problem)


def test_a_writer_that_died_in_the_midst_of_a_line_spoils_nothing(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    with open(mine.log.path, "a") as log:
        log.write('{"n": 2, "kind": "gran')
    assert mine.log.read().problem is None
    mine.log.append("declined", by=BY)
    assert [entry["n"] for entry in mine.log.read().entries] == [1, 2]
    assert mine.log.read().problem is None


def test_a_writer_that_died_before_it_counted_its_entry_spoils_nothing(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    head = (tmp_path / "state" / "approvals.head.json").read_text()
    mine.log.append("declined", by=BY)
    (tmp_path / "state" / "approvals.head.json").write_text(head)
    assert mine.log.read().problem is None
    mine.log.append("declined", by=BY)
    assert len(mine.log.read().entries) == 3


def test_a_log_that_others_can_write_is_not_believed(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    mine.log.path.chmod(0o666)
    assert "chmod 600" in str(mine.log.read().problem)
    assert mine.find(HERE) is None


def test_a_new_log_says_what_became_of_the_old_one(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    mine.log.path.write_text("rubbish\n")
    problem = mine.log.read().problem
    assert problem is not None
    aside = mine.log.restart()
    assert aside is not None
    assert aside.read_text() == "rubbish\n"
    (first,) = mine.log.read().entries
    assert (first["kind"], first["reason"]) == ("restarted", problem)
    give(mine)
    assert mine.log.read().problem is None


def test_a_log_that_is_whole_is_never_put_aside(tmp_path: Path) -> None:
    mine = book(tmp_path)
    granted = give(mine)
    assert mine.log.restart() is None
    assert list(mine.ledger()[0].grants) == [granted.id]


def test_an_entry_that_is_added_while_somebody_reads_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = book(tmp_path)
    give(mine)
    writer = book(tmp_path)
    read_bytes = Path.read_bytes

    def read_and_then_add(path: Path) -> bytes:
        data = read_bytes(path)
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        writer.log.append("declined", by=BY)
        return data

    monkeypatch.setattr(Path, "read_bytes", read_and_then_add)
    assert mine.log.read().problem is None
    assert len(mine.log.read().entries) == 2


def test_a_log_that_is_put_aside_while_somebody_reads_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = book(tmp_path)
    for _ in range(3):
        give(mine)
    mine.log.path.write_text("rubbish\n")
    stat_of, other = Path.stat, book(tmp_path)

    def begin_anew_and_look(path: Path, **options: Any) -> os.stat_result:
        monkeypatch.setattr(Path, "stat", stat_of)
        assert other.log.restart() is not None
        return stat_of(path, **options)

    monkeypatch.setattr(Path, "stat", begin_anew_and_look)
    read = mine.log.read()
    assert read.problem is None
    assert [entry["kind"] for entry in read.entries] == ["restarted"]


def test_looking_again_checks_only_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = book(tmp_path)
    for _ in range(5):
        mine.log.append("declined", by=BY)
    mine.log.read()
    parsed: list[bytes] = []
    loads = json.loads

    def note(line: bytes, **options: Any) -> Any:
        parsed.append(line)
        return loads(line, **options)

    mine.log.append("declined", by=BY)
    monkeypatch.setattr(chain.json, "loads", note)
    assert len(mine.log.read().entries) == 6
    entries = [line for line in parsed if b'"kind"' in bytes(line if isinstance(line, bytes) else b"")]
    assert len(entries) == 1


@pytest.mark.parametrize("number", [0, 2])
def test_an_entry_is_noticed_that_is_edited_after_it_was_checked(tmp_path: Path, number: int) -> None:
    mine = book(tmp_path)
    for _ in range(3):
        give(mine)
    assert mine.log.read().problem is None
    lines = mine.log.path.read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace('"total": 250.0', '"total": 950.0')
    mine.log.path.write_text("".join(lines))
    assert f"edited at entry {number + 1}" in str(mine.log.read().problem)
    lines[number] = lines[number].replace('"total": 950.0', '"total": 250.0')
    mine.log.path.write_text("".join(lines))
    assert mine.log.read().problem is None


DEEP = "[" * 200_000


@pytest.mark.parametrize("head", ['{"n":-7}', '{"n":Infinity}', '{"n":true}', "[]", "3", '{"n":1}', DEEP])
def test_a_count_that_is_none_is_a_problem_told(tmp_path: Path, head: str) -> None:
    mine = book(tmp_path)
    give(mine)
    (tmp_path / "state" / "approvals.head.json").write_text(head)
    assert "cannot be read" in str(mine.log.read().problem)
    assert mine.find(HERE) is None


def hashed(**values: Any) -> str:
    entry = {"n": 1, "kind": "used", **now().to_dict(), "prev": chain.FIRST, **values}
    return json.dumps({**entry, "hash": chain.hash_of(entry)})


@pytest.mark.parametrize(
    "line",
    [
        DEEP, '{"n":1,"prev":' + DEEP, hashed(t=10**400), hashed(t=float("inf")),
        hashed(since_boot=float("nan")),
        hashed(run="a", attempt=float("inf"), seconds=1), hashed(run="a", attempt=1, seconds=10**400),
        hashed(kind="granted", scope={"kind": []}), hashed(kind="granted", per_run=10**400, total=1, ends=1),
    ],
)  # fmt: skip
def test_a_line_with_odd_values_raises_nothing(tmp_path: Path, line: str) -> None:
    mine = book(tmp_path)
    mine.log.path.parent.mkdir()
    mine.log.path.write_text(line + "\n")
    mine.ledger()
    mine.settle()
    assert mine.find(HERE) is None


def append_some(folder: str, count: int) -> None:
    log = AgreementLog(Path(folder))
    for number in range(count):
        log.append("declined", by={"pid": os.getpid()}, number=number)


def test_processes_that_write_at_once_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_some, args=(str(tmp_path), 15)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    read = AgreementLog(tmp_path).read()
    assert read.problem is None
    assert len(read.entries) == 60


@given(data=st.binary(max_size=300))
def test_no_bytes_at_all_raise(data: bytes) -> None:
    entries, _ = check(data)
    replay(entries)


# --- grants


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("name", ["per_run", "total", "ends"])
def test_a_grant_needs_caps_and_an_end_that_are_numbers_above_zero(
    tmp_path: Path, name: str, wrong: float
) -> None:
    mine = book(tmp_path)
    with pytest.raises(UsageError):
        give(mine, **{name: wrong})
    assert mine.log.read().entries == ()


@pytest.mark.parametrize("total", [float("inf"), float("nan"), -5.0, "much", None])
def test_a_grant_written_by_hand_with_a_wrong_number_gives_nobody_anything(total: Any) -> None:
    scope = {"kind": "everywhere", "value": ""}
    caps = {"per_run": 10.0, "total": total, "ends": 9e9}
    entry = {"kind": "granted", "grant": "x", "scope": scope, **caps, **now().to_dict()}
    assert replay([entry]).grants == {}
    assert replay([{**entry, "total": 20.0}]).grants["x"].total == 20.0


def test_scopes_cover_what_they_name_and_the_narrowest_is_used(tmp_path: Path) -> None:
    mine = book(tmp_path)
    everywhere = give(mine, Scope(kind="everywhere"))
    project = give(mine, Scope(kind="project", value="/home/ada"))
    notebook = give(mine, Scope(kind="notebook", value="/home/ada/digits/train.ipynb"))
    one = give(mine, Scope(kind="run", value="r1"))

    def used(place: Place) -> str:
        found = mine.find(place)
        assert found is not None
        return found[0].id

    assert used(HERE) == one.id
    assert used(replace(HERE, run_id="r2")) == notebook.id
    assert used(Place(project="/home/ada/digits", notebook="/home/ada/digits/other.ipynb")) == project.id
    assert used(Place(project="/home/adam", notebook="/home/adam/a.ipynb")) == everywhere.id
    more = give(mine, Scope(kind="everywhere"), per_run=200.0)
    wanting = mine.find(HERE, wanted=150.0)
    assert wanting is not None
    assert wanting[0].id == more.id, "a wider grant that gives enough before a narrower one that does not"


def test_a_rest_in_which_nothing_can_be_done_is_no_grant(tmp_path: Path) -> None:
    mine = book(tmp_path)
    narrow = give(mine, per_run=1000.0, total=1000.0)
    assert mine.reserve(narrow, run(tmp_path, "a"), 1, 999.9) is not None
    other = replace(HERE, run_id="b")
    assert mine.find(other) is None
    assert mine.find(other, wanted=5.0) is None
    assert mine.reserve(narrow, run(tmp_path, "b"), 1, 1000.0) is None
    assert mine.ledger()[0].holders(other, now()) == ["a"]
    wide = give(mine, Scope(kind="everywhere"), per_run=1000.0, total=1000.0)
    found = mine.find(other)
    assert found is not None and found[0].id == wide.id, "it is not hidden by the rest of the narrower one"
    mine.note_use(narrow.id, "a", 1, 940.0)
    found = mine.find(other)
    assert found is not None and found[0].id == narrow.id, "a minute is left"


def test_what_is_reserved_cannot_be_reserved_again_and_use_replaces_it(tmp_path: Path) -> None:
    mine = book(tmp_path)
    grant = give(mine, total=250.0)
    first = mine.reserve(grant, run(tmp_path, "a"), 1, 100.0)
    second = mine.reserve(grant, run(tmp_path, "b"), 1, 100.0)
    third = mine.reserve(grant, run(tmp_path, "c"), 1, 100.0)
    assert [r and r.seconds for r in (first, second, third)] == [100.0, 100.0, pytest.approx(50.0)]
    assert mine.reserve(grant, run(tmp_path, "d"), 1, 100.0) is None
    mine.note_use(grant.id, "a", 1, 30.0)
    assert mine.ledger()[0].left(grant, now()) == pytest.approx(70.0)


def test_nothing_is_reserved_beyond_a_grants_end(tmp_path: Path) -> None:
    mine = book(tmp_path)
    soon = give(mine, ends=now().wall + 30)
    taken = mine.reserve(soon, run(tmp_path, "a"), 1, 100.0)
    assert taken is not None
    assert 0 < taken.seconds <= 30
    assert taken.until_end
    late = give(mine)
    taken = mine.reserve(late, run(tmp_path, "b"), 1, 90.0)
    assert taken is not None
    assert (taken.seconds, taken.until_end) == (90.0, False)
    found = mine.find(HERE)
    assert found is not None
    assert found[0].id == late.id, "not the one that would cut the run off"
    found = mine.find(HERE, wanted=5.0)
    assert found is not None
    assert found[0].id == soon.id, "soonest to end first, where it gives enough"


def test_the_end_of_a_grant_is_written_down_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = book(tmp_path)
    ended, revoked, valid = give(mine, ends=now().wall + 30), give(mine, ends=now().wall + 30), give(mine)
    mine.revoke(revoked.id, BY)
    real = now()
    later = replace(real, wall=real.wall + 31, since_boot=real.since_boot + 31)
    monkeypatch.setattr(book_module, "now", lambda: later)
    for _ in range(3):
        mine.settle()
    noted = [entry["grant"] for entry in mine.log.read().entries if entry["kind"] == "expired"]
    assert noted == [ended.id]
    monkeypatch.undo()
    states = {grant.id: mine.ledger()[0].state_of(grant, now()) for grant in (ended, revoked, valid)}
    assert states[ended.id] == "expired"
    assert states[valid.id] == "valid"


def test_a_revoked_grant_covers_nothing_and_a_second_time_is_an_error(tmp_path: Path) -> None:
    mine = book(tmp_path)
    grant = give(mine)
    assert not mine.is_revoked(grant.id)
    mine.revoke(grant.id[:4], BY)
    assert mine.is_revoked(grant.id)
    assert mine.find(HERE) is None
    assert mine.reserve(grant, run(tmp_path), 1, 10.0) is None
    with pytest.raises(UsageError, match="revoked already"):
        mine.revoke(grant.id, BY)


def test_a_clock_that_was_set_back_prolongs_no_grant(tmp_path: Path) -> None:
    mine = book(tmp_path)
    grant = give(mine, ends=now().wall + 60)
    ledger, _ = mine.ledger()
    here = grant.made
    later = Moment(here.wall - 86400, here.boot_id, here.since_boot + 61)
    assert ledger.state_of(grant, later) == "expired"
    other_boot = Moment(here.wall - 86400, "another", 5.0)
    assert ledger.time_at(other_boot, grant) >= here.wall
    assert ledger.state_of(grant, Moment(here.wall + 59, here.boot_id, here.since_boot + 59)) == "valid"


def test_a_clock_that_was_once_ahead_is_counted_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = book(tmp_path)
    real = now()
    monkeypatch.setattr(log_module, "now", lambda: replace(real, wall=real.wall + 1e6, boot_id="before"))
    mine.log.append("declined", by=BY)
    monkeypatch.undo()
    grant = give(mine, ends=mine.time() + 60)
    ledger, _ = mine.ledger()
    assert ledger.state_of(grant, now()) == "valid"
    here = now()
    later = replace(here, since_boot=here.since_boot + 61)
    assert ledger.state_of(grant, later) == "expired", (
        "it ends as soon as it was to, not when the clock is there"
    )


@given(wall=st.floats(0, 2e9), past=st.floats(0, 2e9), passed=st.floats(0, 1e6), same_boot=st.booleans())
def test_the_true_time_is_never_before_anything_known(
    wall: float, past: float, passed: float, same_boot: bool
) -> None:
    known = Moment(past, "boot", 10.0)
    found = true_time(Moment(wall, "boot" if same_boot else "other", 10.0 + passed), [known])
    assert found >= max(wall, past)
    if same_boot:
        assert found >= past + passed - 1e-3


# --- the table


BARE = Facts(timeout=None, budget=None, typed_now=False, person=False, threshold=600.0, default_timeout=600.0)
LONG = replace(BARE, timeout=10800.0, typed_now=True)


def test_without_a_timeout_and_a_grant_it_starts_at_once_with_the_default_cap() -> None:
    for person in (True, False):
        found = decide(replace(BARE, person=person))
        assert (found.action, found.agreed, found.total) == ("start", "default", 600.0)


def test_an_estimate_beyond_the_threshold_is_asked_where_a_person_is() -> None:
    assert decide(replace(BARE, person=True, estimate_high=700.0)).action == "ask"
    assert decide(replace(BARE, person=True, estimate_high=500.0)).action == "start"
    headless = decide(replace(BARE, estimate_high=700.0))
    assert (headless.action, headless.total) == ("start", 600.0)


def test_what_a_person_types_is_the_agreement() -> None:
    found = decide(replace(LONG, person=True))
    assert (found.action, found.agreed, found.attempt, found.total) == ("start", "typed", 10800.0, None)


def test_a_long_timeout_that_nobody_agreed_to_is_refused() -> None:
    assert decide(LONG).action == "refuse"
    assert decide(replace(BARE, budget=601.0, typed_now=True)).action == "refuse"
    short = decide(replace(BARE, timeout=500.0, typed_now=True))
    assert (short.action, short.attempt, short.total) == ("start", 500.0, 600.0)


def test_a_shorter_limit_where_nobody_sits_is_within_what_a_person_typed() -> None:
    before = replace(BARE, agreed_before="typed", agreed_timeout=10800.0, used=900.0)
    found = decide(replace(before, timeout=480.0, typed_now=True))
    assert (found.action, found.agreed, found.attempt, found.total) == ("start", "typed", 480.0, 10800.0)
    plain = decide(replace(before, timeout=480.0, agreed_timeout=480.0, agreed_total=10800.0))
    assert (plain.agreed, plain.attempt, plain.total) == ("typed", 480.0, 10800.0), "the agreement stays"
    of_all = replace(before, agreed_timeout=3600.0, agreed_total=14400.0, budget=14400.0, typed_now=True)
    assert decide(replace(of_all, timeout=3000.0)).total == 14400.0
    assert decide(replace(of_all, budget=7200.0, timeout=3600.0)).total == 7200.0
    for beyond in ({"timeout": 3700.0}, {"budget": 14500.0}, {"used": 14400.0, "timeout": 3600.0}):
        assert decide(replace(of_all, **beyond)).action == "refuse", beyond
    assert decide(replace(before, timeout=480.0, typed_now=True, agreed_before="default")).total == 600.0


def test_the_users_own_settings_file_may_agree_for_headless_commands() -> None:
    found = decide(replace(LONG, allowed=True))
    assert (found.action, found.agreed, found.attempt) == ("start", "allowed", 10800.0)
    again = decide(replace(LONG, allowed=True, agreed_before="allowed", typed_now=False, used=4000.0))
    assert (again.agreed, again.total) == ("allowed", 10800.0), "together what was typed, never twice of it"
    anew = decide(replace(LONG, allowed=True, agreed_before="allowed", used=4000.0))
    assert (anew.agreed, anew.attempt, anew.total) == ("allowed", 10800.0, None)


def test_a_grant_covers_up_to_its_cap() -> None:
    granted = replace(LONG, granted=14400.0, granted_left=12000.0)
    found = decide(granted)
    assert (found.action, found.agreed, found.attempt, found.total) == ("start", "grant", 10800.0, 14400.0)
    nearly = decide(replace(granted, granted_left=5000.0))
    assert nearly.attempt == 5000.0
    too_long = decide(replace(granted, granted=7200.0))
    assert too_long.action == "refuse"
    assert "2h" in too_long.why
    bare = decide(replace(BARE, granted=7200.0, granted_left=9000.0))
    assert (bare.agreed, bare.total) == ("grant", 7200.0)


def test_in_a_schedulers_job_the_allocation_is_the_agreement() -> None:
    job = replace(BARE, in_job=True, allocation=4000.0, grace=30.0)
    found = decide(job)
    assert (found.action, found.agreed, found.attempt, found.total) == ("start", "allocation", 3910.0, None)
    assert decide(replace(job, timeout=100.0, typed_now=True)).attempt == 100.0
    assert decide(replace(job, timeout=9e4, typed_now=True, person=True)).attempt == 3910.0
    assert decide(replace(job, allocation=80.0)).action == "refuse"
    unknown = decide(replace(job, allocation=None))
    assert (unknown.agreed, unknown.total) == ("default", 600.0)
    assert decide(replace(job, allocation=None, timeout=9000.0, typed_now=True)).agreed == "allocation"


def test_resuming_without_a_person_never_doubles_what_was_typed() -> None:
    typed = replace(BARE, timeout=10800.0, used=4000.0, agreed_before="typed")
    headless = decide(typed)
    assert (headless.action, headless.agreed, headless.total) == ("start", "typed", 10800.0)
    at_hand = decide(replace(typed, person=True))
    assert (at_hand.agreed, at_hand.total) == ("typed", None)


@given(
    timeout=st.none() | st.floats(1, 1e6),
    budget=st.none() | st.floats(1, 1e6),
    typed=st.booleans(),
    before=st.sampled_from(["default", "grant"]),
    high=st.none() | st.floats(1, 1e6),
    granted=st.none() | st.floats(1, 1e6),
)
def test_headless_nothing_beyond_the_threshold_starts_without_a_grant_that_gives_it(
    timeout: float | None,
    budget: float | None,
    typed: bool,
    before: str,
    high: float | None,
    granted: float | None,
) -> None:
    facts = replace(
        BARE,
        timeout=timeout,
        budget=budget,
        typed_now=typed,
        agreed_before=before,
        estimate_high=high,
        granted=granted,
        granted_left=granted,
    )
    found = decide(facts)
    if found.action == decision.START:
        caps = [cap for cap in (found.total, found.attempt) if cap is not None]
        assert min(caps) <= max(600.0, granted or 0.0)
        assert found.total is not None


def test_the_users_file_is_read_strictly(tmp_path: Path) -> None:
    from grd.agreement.book import is_allowed_headless

    file = tmp_path / "config.toml"
    assert not is_allowed_headless(file)
    file.write_text("[approval]\nallow_noninteractive = true\n")
    assert is_allowed_headless(file)
    file.write_text('[approval]\nallow_noninteractive = "yes"\n')
    with pytest.raises(ConfigurationError):
        is_allowed_headless(file)
    file.write_text("approval = 1\n")
    with pytest.raises(ConfigurationError):
        is_allowed_headless(file)


def test_the_head_of_the_log_is_json(tmp_path: Path) -> None:
    mine = book(tmp_path)
    give(mine)
    head = json.loads((tmp_path / "state" / "approvals.head.json").read_text())
    assert head["n"] == 1

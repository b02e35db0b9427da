"""Many runs from one spec: what is refused before anything exists, what is run, what is found again."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from hypothesis import given
from hypothesis import strategies as st
from test_agreement import at_terminal, log, strict  # noqa: F401
from test_magics import Kernel, kernel, loaded  # noqa: F401

import grd
from grd.batch.inputs import sha256_of_input
from grd.batch.jobs import decide
from grd.batch.sharing import THREAD_VARIABLES, has_room, share, thread_environment
from grd.batch.table import Table
from grd.batch.values import split_values
from grd.errors import GrdError, KernelUnavailable, NotFoundError, ResourceUnavailable, UsageError
from grd.interfaces.cli.answer import Surface
from grd.interfaces.cli.main import cli
from grd.runs.model import RunRecord

PARAMETERS = "lr: float = 0.5\nseed: int = 0\nlayers: list = []\nfile = ''\ntimeout = None\nresume = False"
SCORE = """
import os
from grd.experiment import log_metrics
with open("ran.txt", "a") as ran:
    ran.write(f"{lr} {seed}\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
if seed == 13:
    raise ValueError("unlucky")
log_metrics(score=lr * seed)
"""


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a notebook, which is also this process's current folder."""
    project.notebook("score.ipynb", SCORE, parameters=PARAMETERS)
    monkeypatch.chdir(project.path)
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    return project


def nothing_was_made(project: Project) -> bool:
    return not project.runs_dir.exists() and not (project.path / "ran.txt").exists()


ITSELF: list[Any] = []
ITSELF.append({"layers": ITSELF})

WRONG: list[tuple[dict[str, Any], type[GrdError], str]] = [
    ({}, UsageError, "spec: no notebook"),
    ({"notebook": "score.ipynb", "gird": {}}, UsageError, "spec: unknown key 'gird'; did you mean 'grid'"),
    ({"grid": {"lr": [1.0]}}, UsageError, "no notebook"),
    ({"notebook": "gone.ipynb"}, NotFoundError, "spec: no notebook at gone.ipynb"),
    ({"notebook": "score.ipynb", "kernel": "none-such"}, KernelUnavailable, "spec: no kernel 'none-such'"),
    ({"notebook": "score.ipynb", "grid": {"lr": [0.1, "x"]}}, UsageError, r"spec: grid \(lr=x\).*no float"),
    ({"notebook": "score.ipynb", "grid": {"sede": [1]}}, UsageError, r"grid \(sede=1\).*did you mean 'seed'"),
    ({"notebook": "score.ipynb", "grid": {"lr": []}}, UsageError, "spec: grid.lr is empty"),
    ({"notebook": "score.ipynb", "grid": {"seed": "5..3..1"}}, UsageError, "grid.seed: the range"),
    ({"notebook": "score.ipynb", "grid": [1]}, UsageError, "spec: grid must be a mapping"),
    ({"notebook": "score.ipynb", "grid": {"seed": "1..400", "lr": "1..400"}}, UsageError, "160,000 runs"),
    ({"notebook": "score.ipynb", "zip": {"lr": [1.0], "seed": [1, 2]}}, UsageError, "zip: .*equally long"),
    ({"notebook": "score.ipynb", "list": [{"lr": 1.0}, 3]}, UsageError, r"spec: list\[1\] must be a mapping"),
    (
        {"notebook": "score.ipynb", "grid": {"lr": [1.0]}, "list": [{"lr": 2.0}]},
        UsageError,
        "'lr' stands in another list",
    ),
    (
        {"notebook": "score.ipynb", "parameters": {"lr": 1.0}, "grid": {"lr": [1.0]}},
        UsageError,
        "'lr' stands in parameters and in grid",
    ),
    (
        {"notebook": "score.ipynb", "list": [{"lr": 0.1}, {}, {"lr": 0.5}]},
        UsageError,
        r"list\[1\] and list\[2\]: runs 2 and 3 are the same \(lr=0.5\)",
    ),
    ({"notebook": "score.ipynb", "grid": {"timeout": [1, 2]}}, UsageError, "injected by grd itself"),
    ({"notebook": "score.ipynb", "timeout": "soon"}, UsageError, "spec: timeout: 'soon' is no duration"),
    ({"notebook": "score.ipynb", "jobs": 0}, UsageError, "spec: jobs is a number from 1 on"),
    ({"notebook": "score.ipynb", "memory": "lots"}, UsageError, "spec: memory: 'lots' is no size"),
    ({"notebook": "score.ipynb", "inputs": ["gone.csv"]}, NotFoundError, "no input .*gone.csv"),
    ({"notebook": "score.ipynb", "file": "gone.csv"}, NotFoundError, "no file gone.csv"),
    ({"runs": [{"notebook": "score.ipynb", "lr": 1.0}]}, UsageError, r"runs\[0\]: unknown key 'lr'"),
    ({"runs": [{"parameters": {"lr": 1.0}}]}, UsageError, r"runs\[0\]: no notebook"),
    ({"notebook": "score.ipynb", "list": ITSELF}, UsageError, "spec: list: .*contains itself"),
    ({"notebook": "score.ipynb", "grid": {"file": ["\ud800"]}}, UsageError, "spec: grid: .*no Unicode text"),
    ({"notebook": "score.ipynb", "name": "\ud800"}, UsageError, "spec: name: .*no Unicode text"),
    ({"notebook": "score\0.ipynb"}, NotFoundError, "no name of a file"),
    ({"notebook": "score.ipynb", "inputs": ["a\0b"]}, UsageError, "input .* cannot be read"),
    ({"notebook": "score.ipynb", "inputs": [""]}, UsageError, "spec: inputs is a list of files"),
    ({"notebook": "score.ipynb", "file": "a\0.csv"}, UsageError, "cannot be read"),
    ({"notebook": "score.ipynb", "grid": {"seed": f"1..{10**17}"}}, UsageError, "100,000,000,000,000,000 n"),
    ({"notebook": "score.ipynb", "grid": {"seed": f"1..{'9' * 5000}"}}, UsageError, "over 18 digits"),
    ({"notebook": "score.ipynb", "timeout": [1]}, UsageError, r"spec: timeout: \[1\] is no duration"),
    ({"notebook": "score.ipynb", "memory": 1.5}, UsageError, "spec: memory: 1.5 is no size"),
    ({"notebook": "score.ipynb", "memory": "900TB"}, ResourceUnavailable, "needs 9e.05 GB .* in all; give"),
]


def test_what_is_wrong_with_a_spec_is_said_with_its_place_and_nothing_is_made(here: Project) -> None:
    for spec, kind, said in WRONG:
        with pytest.raises(kind, match=said):
            grd.batch(spec)
    assert nothing_was_made(here)


def test_errors_in_files_are_one_line_with_their_exit_code(here: Project) -> None:
    files = {
        "two.yaml": ("notebook: score.ipynb\ngrid: {lr: [1, x, y]}", "two.yaml: grid (lr=x)"),
        "twice.yaml": ("notebook: score.ipynb\nnotebook: b.ipynb", "twice.yaml: line 2 has 'notebook'"),
        "again.json": ('{"notebook": "a.ipynb", "notebook": "b.ipynb"}', "it has 'notebook' a second time"),
        "deep.json": ("[" * 100_000, "deep.json: no valid JSON: it is nested too deeply"),
        "deep.yaml": ("[" * 20_000, "deep.yaml: no valid YAML"),
        "long.yaml": ("seed: " + "9" * 5000, "long.yaml: no valid YAML"),
        "bad.json": ('{"notebook": ', "bad.json: no valid JSON"),
        "rows.csv": ("lr,seed\n1,2\n3\n", "rows.csv: line 3 has 1 values for 2 columns"),
        "values.csv": ("lr,seed\n1,2\n3,x\n", "values.csv: line 3 (lr=3 seed=x): parameter 'seed'"),
        "spec.toml": ("notebook = 1", "spec.toml: a spec is a file that ends with"),
    }
    for name, (text, said) in files.items():
        (here.path / name).write_text(text)
        with pytest.raises(UsageError) as wrong:
            grd.batch(name, notebook="score.ipynb" if name.endswith("csv") else None)
        assert said in str(wrong.value)
    done = here.grd("batch", "two.yaml")
    assert (done.code, done.out, len(done.err.strip().splitlines())) == (2, "", 1)
    assert done.err.startswith("grd: two.yaml: grid (lr=x): parameter 'lr': 'x' is no float")
    assert "(and 1 more of 3 runs are wrong)" in done.err
    assert here.grd("batch", "none.yaml").code == 66
    assert nothing_was_made(here)


def typed(*arguments: str) -> Any:
    """What a command answers, executed by the very same code in this process."""
    return cli.main([*arguments], prog_name="grd", standalone_mode=False, obj=Surface(prints=False)).document


def dry(project: Project, *arguments: str) -> list[dict[str, Any]]:
    """The parameters of the runs that a command would start."""
    plan = typed(*arguments, "--dry-run")
    assert nothing_was_made(project)
    return [run["parameters"] for run in plan["runs"]]


def test_grid_zip_list_and_files_give_the_same_runs_as_typed_and_as_written(here: Project) -> None:
    grid = [{"lr": lr, "seed": seed} for lr in (0.1, 0.001) for seed in (1, 2, 3)]
    assert dry(here, "sweep", "score.ipynb", "-g", "lr", "0.1,1e-3", "-g", "seed", "1..3") == grid
    (here.path / "a.yaml").write_text("notebook: score.ipynb\ngrid: {lr: [0.1, 1e-3], seed: 1..3}\njobs: 1")
    assert dry(here, "batch", "a.yaml") == grid
    table = io.StringIO()
    csv.writer(table).writerows([["lr", "seed"], *([row["lr"], row["seed"]] for row in grid)])
    (here.path / "rows.csv").write_text(table.getvalue() + "\n")
    assert dry(here, "batch", "--notebook", "score.ipynb", "rows.csv") == grid
    assert dry(here, "sweep", "score.ipynb", "--file", "rows.csv") == grid
    (here.path / "list.json").write_text(json.dumps(grid))
    assert dry(here, "batch", "list.json", "--notebook", "score.ipynb") == grid
    mixed = dry(
        here, "sweep", "score.ipynb", "-z", "lr", "1,2", "-z", "seed", "8..7", "-g", "layers", "[4],[4,2]",
        "-p", "file", "a,b",
    )  # fmt: skip
    assert [(row["lr"], row["seed"], row["layers"]) for row in mixed] == [
        (1.0, 8, [4]),
        (2.0, 7, [4]),
        (1.0, 8, [4, 2]),
        (2.0, 7, [4, 2]),
    ]
    assert {row["file"] for row in mixed} == {"a,b"}


def test_yaml_may_merge_mappings(here: Project) -> None:
    (here.path / "merged.yaml").write_text(
        "notebook: score.ipynb\nlist: [&one {seed: 1, lr: 0.5}, {<<: *one, seed: 2}]\n"
    )
    assert dry(here, "batch", "merged.yaml") == [{"seed": 1, "lr": 0.5}, {"seed": 2, "lr": 0.5}]


def test_values_are_split_outside_of_brackets_and_quotes() -> None:
    assert split_values("1..3,7") == [1, 2, 3, "7"]
    assert split_values("10..0..-5") == [10, 5, 0]
    assert split_values('[1,2],{"a":[1,2]},"b,c"') == [[1, 2], {"a": [1, 2]}, "b,c"]
    assert split_values("don't,do") == ["don't", "do"]
    assert split_values("-1.5e-3, x ") == ["-1.5e-3", "x"]
    for wrong in ("", "1,,2", "1..2.5", "3..1..1", "0..999999999"):
        with pytest.raises(UsageError):
            split_values(wrong)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=5))
def test_numbers_that_are_typed_stay_as_many_as_they_are(numbers: list[int]) -> None:
    assert [int(value) for value in split_values(",".join(map(str, numbers)))] == numbers


def test_a_sweep_is_run_once_and_found_again_and_every_command_tells_the_same(here: Project) -> None:
    done = here.grd("sweep", "score.ipynb", "-g", "seed", "2,3", "--jobs", "2", "--json")
    assert done.code == 0, done.err
    shown = done.json
    assert (shown["state"], shown["counts"], shown["total"]) == ("completed", {"completed": 2}, 2)
    assert [row["metrics"] for row in shown["runs"]] == [{"score": 1.0}, {"score": 1.5}]
    events = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    assert [e["step"] for e in events if e.get("index") == 1] == ["starting", "started", "ended"]
    assert typed("batch", "status") == shown == typed("batch", "wait")

    again = here.grd("sweep", "score.ipynb", "-g", "seed", "2..4", "-p", "lr", "0.5", "--json")
    assert again.code == 0, again.err
    assert [row["found"] for row in again.json["runs"]] == [True, True, False]
    assert sorted((here.path / "ran.txt").read_text().split("\n")[:-1]) == ["0.5 2", "0.5 3", "0.5 4"]

    rows = list(csv.DictReader(io.StringIO(grd.Batch(again.json["folder"]).table.csv())))
    assert [row["metrics.score"] for row in rows] == ["1.0", "1.5", "2.0"]
    assert [row["parameters.seed"] for row in rows] == ["2", "3", "4"]
    listed = typed("list")["runs"]
    assert {run["batch"]["id"] for run in listed} == {shown["batch_id"], again.json["batch_id"]}
    first = shown["runs"][0]["run_id"]
    assert f"{shown['batch_id']}, its run 1" in here.grd("status", first).out
    assert len(listed) == len(here.run_folders()) == 3
    with pytest.raises(NotFoundError):
        typed("status", "batches")
    assert not [each for each in typed("gc")["removed"] if "batches" in each["path"]]
    assert [each["state"] for each in typed("batch", "list")["batches"]] == ["completed"] * 2
    cores = share(wanted=2, runs=2, cores=len(os.sched_getaffinity(0)), memory=None, needed=None)
    assert f"threads {cores.threads}" in here.grd("logs", first).out

    found = grd.Batch(shown["folder"])
    assert (found.state, len(found.runs), found.wait(5)) == ("completed", 2, True)
    assert found.runs[0].metrics == {"score": 1.0}
    html = found._repr_html_()
    assert "<th>seed</th>" in html
    assert first in html
    assert here.processes() == []
    # The spec as it was submitted can be submitted again.
    spec = Path(again.json["folder"], "spec.json")
    assert dry_total("batch", str(spec)) == (3, 0)
    assert dry_total("batch", str(spec), "--force") == (3, 3)
    here.notebook("score.ipynb", SCORE + "\n", "# other code", parameters=PARAMETERS)
    assert dry_total("batch", str(spec)) == (3, 3)
    refused = here.grd("batch", str(spec), "--memory", "900TB", "--dry-run")
    assert (refused.code, "of memory, and there are" in refused.err) == (69, True), refused.err


def dry_total(*arguments: str) -> tuple[int, int]:
    plan = typed(*arguments, "--dry-run")
    return plan["total"], plan["to_run"]


@pytest.mark.faults
def test_a_sweep_that_is_typed_again_with_more_time_gives_it_to_what_had_too_little(here: Project) -> None:
    here.notebook(
        "long.ipynb",
        "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)",
        parameters=PARAMETERS,
    )
    sweep = ("sweep", "long.ipynb", "-g", "seed", "1,2", "--json")
    short = here.grd(*sweep, "--timeout", "2s")
    assert (short.code, short.json["counts"]) == (75, {"interrupted": 2}), short.err
    (here.path / "go").touch()
    longer = here.grd(*sweep, "--timeout", "2m")
    assert (longer.code, longer.json["counts"]) == (0, {"completed": 2}), longer.err
    assert len(here.run_folders()) == 2
    assert [here.record(run)["timeout"] for run in here.run_folders()] == [120.0, 120.0]


def test_a_batch_must_be_named_for_a_stop_and_a_resume(here: Project) -> None:
    for command in ("stop", "resume"):
        done = here.grd("batch", command)
        assert done.code == 2 and "Missing argument" in done.err, done.err


def test_a_damaged_batch_hides_only_itself(here: Project) -> None:
    assert here.grd("sweep", "score.ipynb", "-g", "seed", "1", "-q").code == 0
    odd = here.runs_dir / "batches" / "zz-odd"
    odd.mkdir()
    (odd / "batch.json").write_text("{}")
    [shown] = here.grd("batch", "list", "--json").json["batches"]
    assert here.grd("batch", "status", "--json").json["batch_id"] == shown["batch_id"]
    assert here.grd("batch", "status", "zz-odd").code == 78


def test_a_declared_input_makes_another_run_when_it_changes(here: Project) -> None:
    (here.path / "data").mkdir()
    (here.path / "data" / "a.csv").write_text("1")
    spec = {"notebook": "score.ipynb", "inputs": ["data"]}
    from grd.batch.submitting import plan_of

    before = plan_of(spec).runs[0].key
    assert plan_of(spec).runs[0].key == before != plan_of({"notebook": "score.ipynb"}).runs[0].key
    (here.path / "data" / "a.csv").write_text("2")
    assert plan_of(spec).runs[0].key != before


def test_an_input_is_also_what_lies_behind_links(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (elsewhere / "more").mkdir(parents=True)
    data.mkdir()
    (data / "linked").symlink_to(elsewhere)
    (data / "to-nothing").symlink_to("../nothing")
    (elsewhere / "more" / "back").symlink_to(data)  # and so on for ever
    seen = [sha256_of_input(data)]
    for change in (
        lambda: (elsewhere / "more" / "y.csv").write_text("1"),
        lambda: (elsewhere / "more" / "y.csv").write_text("2"),
        lambda: (elsewhere / "more" / "y.csv").rename(elsewhere / "y.csv"),
        lambda: (tmp_path / "nothing").write_text("3"),
        lambda: (data / "empty").symlink_to(elsewhere / "more"),
    ):
        change()
        seen.append(sha256_of_input(data))
        assert sha256_of_input(data) == seen[-1]
    assert len(set(seen)) == 6


def test_an_input_that_would_never_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match=r"input .*/pipe is neither a file nor a folder"):
            sha256_of_input(path)
    with pytest.raises(UsageError, match="input /dev/zero is neither"):
        sha256_of_input(Path("/dev/zero"))


def test_long_runs_that_nobody_agreed_to_are_refused_before_anything_exists(here: Project) -> None:
    Path(here.environment["XDG_CONFIG_HOME"], "grd", "config.toml").unlink()
    refused = here.grd("sweep", "score.ipynb", "-g", "seed", "1..3", "--timeout", "2h")
    assert refused.code == 77
    assert "grd approve --max 2h" in refused.err
    assert nothing_was_made(here)


def test_there_are_never_more_jobs_and_threads_than_cores_and_memory() -> None:
    def jobs(
        wanted: int | None, cores: int | None, memory: int | None = None, needed: int | None = None
    ) -> Any:
        found = share(wanted=wanted, runs=10, cores=cores, memory=memory, needed=needed)
        assert found.jobs * found.threads <= max(cores or 1, found.jobs)
        return found.jobs, found.threads

    assert jobs(None, 8) == (8, 1)
    assert jobs(2, 8) == (2, 4)
    assert jobs(64, 8) == (8, 1)
    assert jobs(3, 8) == (3, 2)
    assert jobs(None, 8, memory=10_000, needed=4_000) == (2, 4)
    assert jobs(None, 8, memory=10_000, needed=40_000) == (1, 8)
    assert jobs(None, None) == (1, 1)
    assert share(wanted=4, runs=9, cores=2, memory=None, needed=None).bound_by == "2 usable cores"
    assert share(wanted=2, runs=9, cores=2, memory=None, needed=None).bound_by is None
    threads = thread_environment(4, {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "16"})
    assert (threads["OMP_NUM_THREADS"], threads["MKL_NUM_THREADS"]) == ("2", "4")
    assert set(threads) == set(THREAD_VARIABLES)
    assert has_room(available=0, needed=100, in_use=[])
    assert has_room(available=150, needed=100, in_use=[50])
    assert not has_room(available=149, needed=100, in_use=[50])


def test_what_a_job_does_with_the_run_that_has_its_key() -> None:
    def does(
        state: str, *, of: str = "b", force: bool = False, retry: bool = False, going: bool = False
    ) -> str:
        record = RunRecord(
            run_id="r", name="r", notebook="n", notebook_sha256="", working_dir="", checkpoint_dir="",
            created_at="", folder="", state=state, batch={"id": of, "index": 0},
        )  # fmt: skip
        job = {"batch": "b", "force": force, "retry_failed": retry}
        return decide(record, job, under_way=going)

    assert does("completed") == does("completed", of="other") == "show"
    assert (does("completed", of="other", force=True), does("completed", force=True)) == ("start", "show")
    assert (does("running"), does("queued"), does("interrupted", going=True)) == ("attach",) * 3
    assert (does("interrupted"), does("interrupted", force=True)) == ("resume", "resume")
    assert (does("failed"), does("failed", retry=True), does("failed", of="x")) == (
        "show",
        "resume",
        "resume",
    )


def test_the_package_is_the_function_whatever_is_imported_first(here: Project) -> None:
    code = "import grd.batch.plan\nfrom grd import batch\nassert batch is grd.batch\n"
    code += "try:\n    grd.batch({})\nexcept grd.GrdError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "no notebook" in done.stdout, done.stderr


@pytest.mark.faults
def test_the_magic_sweeps_and_answers_with_the_batch(loaded: Kernel, here: Project) -> None:  # noqa: F811
    assert loaded.type("plan = %grd sweep score.ipynb -g seed 1..2 --dry-run").ok
    assert loaded.value("plan['total']") == 2
    assert loaded.type("b = %grd sweep score.ipynb -g seed 5 --wait").ok
    assert loaded.value("[b.state, len(b.runs)]") == ["completed", 1]
    shown = loaded.type("b")
    assert shown.ok
    wrong = loaded.type("%grd sweep score.ipynb -g sede 1")
    assert not wrong.ok
    assert "did you mean 'seed'" in wrong.stderr


@pytest.mark.faults
def test_a_failure_lets_the_others_go_on_and_fail_fast_starts_no_more(here: Project) -> None:
    done = here.grd("sweep", "score.ipynb", "-g", "seed", "13,1", "--jobs", "1", "--json")
    assert done.code == 1
    assert done.json["counts"] == {"completed": 1, "failed": 1}
    assert done.json["runs"][0]["cause"] == "notebook_error"
    assert not done.json["resumable"]
    fast = here.grd(
        "sweep", "score.ipynb", "-g", "seed", "13,2", "-p", "lr", "2", "--jobs", "1", "--fail-fast"
    )
    assert fast.code == 1
    assert "1 runs are not started" in fast.err
    shown = here.grd("batch", "status", "--json").json
    assert shown["counts"] == {"failed": 1, "cancelled": 1}
    assert shown["resume_command"] == f"grd batch resume {shown['batch_id']}"
    resumed = here.grd("batch", "resume", "last", "--json")
    assert (resumed.code, resumed.json["counts"]) == (1, {"completed": 1, "failed": 1})
    assert resumed.json["runs"][0]["attempts"] == 1
    retried = here.grd("batch", "resume", "last", "--failed", "--json")
    assert (retried.code, retried.json["runs"][0]["attempts"]) == (1, 2)
    assert retried.json["runs"][1]["attempts"] == 1


DIES_ONCE = """
import os, pathlib
mark = pathlib.Path(f"begun-{seed}")
if not mark.exists():
    mark.touch()
    os._exit(3)
"""


@pytest.mark.faults
def test_a_run_whose_kernel_died_is_resumed_as_often_as_was_said(here: Project) -> None:
    here.notebook("dies.ipynb", DIES_ONCE, parameters=PARAMETERS)
    sweep = ("sweep", "dies.ipynb", "-g", "seed", "1..2", "--jobs", "2", "--json")
    once = here.grd(*sweep)
    assert once.code == 75, once.err
    assert {run["cause"] for run in once.json["runs"]} == {"kernel_died"}
    for mark in here.path.glob("begun-*"):
        mark.unlink()
    twice = here.grd(*sweep, "--force", "--max-attempts", "2", env={"GRD_RETRY_DELAY": "0.01"})
    assert twice.code == 0, twice.err
    runs = [here.record(here.runs_dir / run["run_id"]) for run in twice.json["runs"]]
    assert [[each["cause"] for each in run["attempts"]] for run in runs] == [["kernel_died", None]] * 2
    assert here.grd("sweep", "dies.ipynb", "-g", "seed", "1", "--max-attempts", "0").code == 2


@pytest.mark.faults
def test_forced_runs_run_again_and_the_notebook_is_the_one_that_was_submitted(here: Project) -> None:
    assert here.grd("sweep", "score.ipynb", "-g", "seed", "1").code == 0
    forced = here.grd("sweep", "score.ipynb", "-g", "seed", "1", "--force", "--json")
    assert (forced.code, forced.json["runs"][0]["found"]) == (0, False)
    assert (here.path / "ran.txt").read_text() == "0.5 1\n" * 2
    slow = "import time, pathlib\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.05)"
    here.notebook("score.ipynb", slow, SCORE, parameters=PARAMETERS)
    detached = here.grd("sweep", "score.ipynb", "-g", "seed", "6,7", "--jobs", "1", "--detach", "--json")
    assert (detached.code, detached.json["state"]) == (0, "running")
    assert here.grd("batch", "wait", "last", "--timeout", "0.1").code == 124
    here.notebook("score.ipynb", "raise SystemExit('not this one')", parameters=PARAMETERS)
    (here.path / "go").touch()
    assert here.grd("batch", "wait", "last", "--json").json["counts"] == {"completed": 2}


@pytest.mark.faults
def test_a_person_agrees_to_the_whole_batch_once_and_that_is_its_grant(strict: Project) -> None:  # noqa: F811
    (strict.path / "long.yaml").write_text("notebook: train.ipynb\ngrid: {epochs: [1, 2]}\ntimeout: 20m\n")
    declined = at_terminal(strict, "batch", "long.yaml", typed="n\n")
    assert declined.code == 77, declined.err
    assert "20m for each run and 40m for all of them together" in declined.err
    assert not strict.runs_dir.exists()
    done = at_terminal(strict, "batch", "long.yaml", "--json", typed="y\n")
    assert done.code == 0, done.err
    granted = next(entry for entry in log(strict) if entry["kind"] == "granted")
    assert granted["scope"] == {"kind": "batch", "value": done.json["batch_id"]}
    assert (granted["per_run"], granted["total"]) == (1200, 2400)
    assert granted["grant"] == done.json["grant"]
    for row in done.json["runs"]:
        budget = strict.record(strict.runs_dir / row["run_id"])["budget"]
        assert (budget["agreed"], budget["grant"], budget["seconds"]) == ("grant", granted["grant"], 1200)
    assert [entry["kind"] for entry in log(strict)].count("used") == 2
    # What was granted for one batch is nobody else's.
    assert strict.grd("sweep", "train.ipynb", "-g", "epochs", "3", "--timeout", "20m").code == 77


def test_a_table_shows_each_value_as_it_is_and_on_one_line() -> None:
    def row(index: int, metrics: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        empty = dict.fromkeys(("cause", "seconds", "run_id", "started_at", "ended_at", "attempts"))
        return {
            **empty, "index": index, "state": "failed", "detail": "bad\n\x1b[31mred", "notebook": "a.ipynb",
            "parameters": parameters, "metrics": metrics, "found": False,
        }  # fmt: skip

    rows = [
        row(0, {"loss": None}, lr=0.12345678, name="a\nb"),
        row(1, {"loss": 0.123456}, lr=0.12345679, name="\x9b31m"),
        row(2, {}, lr=1e-3, name="plain"),
    ]
    shown = {
        "batch_id": "b", "state": "failed", "cause": None, "total": 3, "detail": None, "folder": "/b",
        "counts": {"failed": 3}, "resume_command": None, "runs": rows,
    }  # fmt: skip
    lines = Table(shown).lines()
    assert "".join(lines).isprintable()
    table = [line.split() for line in lines[4:7]]
    assert [cells[1] for cells in table] == ["0.12345678", "0.12345679", "0.001"]
    assert [cells[2] for cells in table] == ['"a\\nb"', '"\\x9b31m"', "plain"]
    assert [cells[6:-1] for cells in table] == [["not", "finite"], ["0.1235"], ["-"]]
    losses = [line["metrics.loss"] for line in csv.DictReader(io.StringIO(Table(shown).csv()))]
    assert losses == ["NaN", "0.123456", ""]

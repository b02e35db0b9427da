"""``%grd`` in real kernels and in an IPython shell, completion, and awaiting runs.

The kernels are of the ipykernel that the tests' own Python has; ``make test-ipykernel6`` runs them with 6.31.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import nbclient
import nbformat
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel
from test_json_shapes import documented
from traitlets.config import Config

from grd.interfaces.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("papermill", "nbclient", "torch", "mlflow", "pandas", "dask", "ipywidgets")

PARAMETERS = "epochs = 3\ngate = ''\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
GATED = """
import time
from pathlib import Path
from grd.experiment import training
state = {"total": 0}
for epoch in training.epochs(epochs, state=state, checkpoint_dir=checkpoint_dir, resume=resume):
    if epoch == 1:
        print("at the gate", flush=True)
    while epoch == 1 and gate and not Path(gate).exists():
        time.sleep(0.05)
    state["total"] += 1
    epoch.log(total=state["total"])
"""
STOPPABLE = """
import time
from grd.experiment import training
for epoch in training.epochs(2000, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    time.sleep(0.05)
    epoch.log(done=int(epoch))
"""


# --- a real kernel ---------------------------------------------------------------------------------------


@dataclass
class Reply:
    """What one cell sent."""

    stdout: str = ""
    stderr: str = ""
    shown: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    asked: bool = False
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the cell ended without an error."""
        return self.content["status"] == "ok"

    @property
    def plain(self) -> str:
        """The only thing displayed, as text."""
        assert len(self.shown) == 1, self
        text: str = self.shown[0]["text/plain"]
        return text


class Kernel:
    """A kernel that a person types cells into."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager, self.client = manager, client
        self.is_attended = False
        """Whether its front end says that somebody can answer, as JupyterLab does."""

    def send(self, code: str) -> str:
        """Type a cell without waiting for it."""
        message: str = self.client.execute(code, allow_stdin=self.is_attended)
        return message

    def reply_to(self, message: str) -> Reply:
        """Everything a cell sent until it ended."""
        reply = Reply()
        while True:
            received = self.client.get_iopub_msg(timeout=LIMIT_SECONDS)
            if received["parent_header"].get("msg_id") != message:
                continue
            kind, content = received["msg_type"], received["content"]
            if kind == "stream":
                setattr(reply, content["name"], getattr(reply, content["name"]) + content["text"])
            elif kind in ("execute_result", "display_data"):
                reply.shown.append(content["data"])
            elif kind == "error":
                reply.errors.append(content)
            elif kind == "status" and content["execution_state"] == "idle":
                break
        while True:
            answer = self.client.get_shell_msg(timeout=LIMIT_SECONDS)
            if answer["parent_header"].get("msg_id") == message:
                reply.content = answer["content"]
                return reply

    def type(self, code: str) -> Reply:
        """Type a cell; its reply."""
        return self.reply_to(self.send(code))

    def value(self, expression: str) -> Any:
        """A JSON value of the kernel's user."""
        done = self.type(f"import json; print('VALUE' + json.dumps({expression}))")
        assert done.ok, done
        return json.loads(done.stdout.split("VALUE", 1)[1])


@pytest.fixture
def kernel(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    spec = project.path / "jupyter" / "kernels" / "under-test"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "under test", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(project.path / "jupyter"))
    environment = {**project.environment, "PYTHONPATH": str(ROOT)}
    manager, client = start_new_kernel(
        kernel_name="under-test", cwd=str(project.path), env=environment, startup_timeout=LIMIT_SECONDS
    )
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        if manager.is_alive():
            manager.shutdown_kernel(now=True)


@pytest.fixture
def loaded(kernel: Kernel) -> Kernel:
    assert kernel.type("%load_ext grd").ok
    return kernel


@pytest.mark.usefixtures("torch_in_kernels")  # so that it could be imported
def test_loading_and_looking_load_no_heavy_package(kernel: Kernel, project: Project) -> None:
    before = set(kernel.value(f"[n for n in {HEAVY!r} if n in __import__('sys').modules]"))
    assert before == set()
    first = kernel.type("%load_ext grd\n%grd status\n%grd list")
    assert first.ok and "no runs in" in first.stdout, first
    assert kernel.value(f"[n for n in {HEAVY!r} if n in __import__('sys').modules]") == []


def test_a_run_started_in_a_cell_goes_on_while_the_next_cells_look_at_it(
    loaded: Kernel, project: Project
) -> None:
    project.notebook("train.ipynb", GATED, parameters=PARAMETERS)
    loaded.type("n = 4; door = 'a gate'")
    started = loaded.type('run = %grd research train.ipynb -p epochs {n} -p gate "$door" --timeout 5m\nrun')
    assert started.ok, started
    assert started.plain.startswith("<Run ") and "<table>" in started.shown[0]["text/html"]
    project.wait_for_output("at the gate")
    assert loaded.value("type(run).__name__") == "Run"
    run_id = loaded.value("run.id")
    assert project.only_run().name == run_id
    assert loaded.value("run.to_dict()['parameters']") == {"epochs": 4, "gate": "a gate"}

    of_session = loaded.type("%grd status")
    assert run_id in of_session.plain and "running" in of_session.plain
    assert of_session.stdout == ""
    everything = loaded.type("%grd status --all")
    assert everything.stdout.startswith("Running:") and everything.shown == []

    late = loaded.type("waited = %grd wait last --timeout 0.2")
    assert "the run goes on" in late.stderr
    assert loaded.value("waited['timed_out']") is True
    (project.path / "a gate").touch()
    waited = loaded.type("%grd wait {run.id}")
    assert waited.ok and waited.stdout.count(f"{run_id}: completed") == 1
    assert waited.shown == []
    assert loaded.value("run.state") == "completed"

    listed = loaded.type("%grd list")
    assert run_id in listed.plain and "<table>" in listed.shown[0]["text/html"] and listed.stdout == ""
    assert loaded.type("%grd logs last").stdout == "at the gate\n"
    assert '"kind": "metrics"' in loaded.type("%grd events last").stdout
    found = loaded.type("found = %grd result last")
    assert "metrics" not in found.stdout and "total" in found.stdout
    assert loaded.value("found['metrics']") == {"total": 4}
    again = loaded.type("found")
    assert again.stdout == "" and "total" in again.plain


def test_objects_say_what_the_command_line_says_with_json(loaded: Kernel, project: Project) -> None:
    project.notebook("train.ipynb", "print('hello')", parameters=PARAMETERS)
    waited = loaded.type("run = %grd research train.ipynb --wait")
    assert waited.ok and "grd: run " in waited.stderr
    assert loaded.value("run.state") == "completed"
    for command in (
        "status last",
        "status --all",
        "list",
        "result last",
        "wait last",
        "config show",
        "gc --dry-run",
    ):
        assert loaded.type(f"found = %grd {command}").ok
        assert loaded.value("found.to_dict()") == project.grd(*command.split(), "--json").json, command
        as_json = loaded.type(f"%grd {command} --json")
        assert json.loads(as_json.stdout)["schema"].startswith("grd."), command
        assert as_json.shown == []
    assert loaded.type("table = %grd list").ok
    assert loaded.value("[len(table), table[0].id == run.id, [r.id for r in table] == [run.id]]") == [
        1,
        True,
        True,
    ]
    assert loaded.value("[table[run.id].state, table[:0].to_dict()['runs']]") == ["completed", []]
    removed = loaded.type("removed = %grd rm last")
    assert "in all" in removed.stdout
    assert loaded.value("removed.to_dict()['schema']") == "grd.rm/1"
    assert [path for path in project.run_folders() if not path.name.startswith(".")] == []
    gone = loaded.type("%grd status")
    assert gone.ok and "no runs in" in gone.stdout


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%grd status nope", "no run 'nope'"),
        ("%grd reserch a.ipynb", "did you mean: grd research"),
        ("%grd research", "Missing argument 'NOTEBOOK'"),
        ("%grd research nope.ipynb", "nope.ipynb"),
        ("%grd list --limit many", "many"),
        ("%grd status 'unfinished", "No closing quotation"),
    ],
)
def test_an_error_is_one_line_and_fails_the_cell(loaded: Kernel, line: str, says: str) -> None:
    failed = loaded.type(line)
    assert not failed.ok
    assert failed.content["ename"] == "UsageError"
    said = failed.stderr.strip().splitlines()
    assert len(said) == 1 and says in said[0], failed
    assert failed.errors == [] and failed.stdout == "" and failed.shown == []
    assert loaded.type("1").ok


def test_interrupting_a_cell_that_waits_stops_the_run_with_its_checkpoint(
    loaded: Kernel, project: Project
) -> None:
    project.notebook("train.ipynb", STOPPABLE, parameters=PARAMETERS)
    message = loaded.send("run = %grd research train.ipynb --timeout 5m --wait\nrun")
    project.wait_for_event("metrics", epoch=2)
    loaded.manager.interrupt_kernel()
    stopped = loaded.reply_to(message)
    assert stopped.ok, stopped
    assert "interrupted (sigint)" in stopped.plain
    assert project.record()["checkpoint"] is not None
    resumed = loaded.type("again = %grd resume last\nagain")
    assert resumed.ok and "<Run " in resumed.plain
    project.wait_for_event("resume")
    asked = loaded.type("%grd stop last")
    assert "interrupted (stopped)" in asked.stdout
    assert project.processes() == []


def test_interrupting_a_cell_that_only_follows_leaves_the_run_alone(loaded: Kernel, project: Project) -> None:
    project.notebook("train.ipynb", GATED, parameters=PARAMETERS)
    loaded.type("%grd research train.ipynb -p gate gate --timeout 5m")
    project.wait_for_output("at the gate")
    message = loaded.send("%grd logs last --follow")
    wait_for_stream(loaded, message)
    loaded.manager.interrupt_kernel()
    reply = loaded.reply_to(message)
    assert reply.content["status"] == "error" and reply.errors == [], reply
    assert project.record()["state"] == "running"
    (project.path / "gate").touch()
    wait_until(lambda: project.record()["state"] == "completed", "the record")


def wait_for_stream(kernel: Kernel, message: str) -> None:
    """Until the cell has printed something."""
    while True:
        received = kernel.client.get_iopub_msg(timeout=LIMIT_SECONDS)
        if received["parent_header"].get("msg_id") == message and received["msg_type"] == "stream":
            return


def test_a_run_outlives_the_kernel_that_started_it(loaded: Kernel, project: Project) -> None:
    project.notebook("train.ipynb", GATED, parameters=PARAMETERS)
    assert loaded.type("%grd research train.ipynb -p gate gate --timeout 5m").ok
    project.wait_for_output("at the gate")
    loaded.client.stop_channels()
    loaded.manager.shutdown_kernel()
    (project.path / "gate").touch()
    wait_until(lambda: project.record()["state"] == "completed", "the record")


def test_exploring_in_a_cell_gives_the_profile(loaded: Kernel, project: Project) -> None:
    found = loaded.type("found = %grd explore\nfound")
    assert found.ok, found
    assert "<ul>" in found.shown[-1]["text/html"]
    assert loaded.value("found.to_dict()['schema']") == "grd.explore/1"
    assert (project.path / ".planning" / "DATA_REPORT.md").exists()


def test_where_nobody_can_answer_nothing_asks_and_errors_end_the_notebook(project: Project) -> None:
    project.notebook("train.ipynb", "print('hello')", parameters=PARAMETERS)
    notebook = nbformat.v4.new_notebook()
    for source in (
        "%load_ext grd",
        "run = %grd research train.ipynb --wait",
        "run",
        "%grd rm nope",
        "print(1)",
    ):
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=LIMIT_SECONDS)
    environment = {**project.environment, "PYTHONPATH": str(ROOT)}
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no run 'nope'"):
        client.execute(cwd=str(project.path), env=environment)
    assert "completed" in notebook.cells[2].outputs[0]["data"]["text/plain"]
    assert notebook.cells[4].execution_count is None


# --- an IPython shell ------------------------------------------------------------------------------------


@pytest.fixture
def shell(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.chdir(project.path)
    for name in ("GRD_STATE_DIR", "XDG_CONFIG_HOME", "IPYTHONDIR"):
        monkeypatch.setenv(name, project.environment[name])
    InteractiveShell.clear_instance()
    config = Config({"HistoryManager": {"enabled": False}, "Completer": {"use_jedi": False}})
    made = InteractiveShell.instance(config=config)
    made.run_line_magic("load_ext", "grd")
    yield made
    InteractiveShell.clear_instance()


def completions(shell: InteractiveShell, line: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        _, found = shell.complete("", line, len(line))
    return list(found)


def test_commands_options_and_notebooks_are_completed(shell: InteractiveShell, project: Project) -> None:
    project.notebook("train.ipynb", "1")
    project.notebook("deep/nested.ipynb", "1")
    (project.path / "train.txt").touch()
    assert completions(shell, "%grd re") == ["research", "resume", "result", "revoke", "recover"]
    assert completions(shell, "x = %grd re") == ["research", "resume", "result", "revoke", "recover"]
    assert completions(shell, "%grd help res") == ["research", "resume", "result"]
    assert completions(shell, "%grd config s") == ["show"]
    assert completions(shell, "%grd research tr") == ["train.ipynb"]
    assert completions(shell, "%grd research de") == ["deep/"]
    assert completions(shell, "%grd research deep/") == ["deep/nested.ipynb"]
    assert {"train.ipynb", "deep/", "--timeout", "--detach"} <= set(completions(shell, "%grd research "))
    assert completions(shell, "%grd research train.ipynb --de") == ["--detach"]
    assert completions(shell, "%grd list --state inter") == ["interrupted"]


def test_run_ids_are_completed_here_and_in_shells(shell: InteractiveShell, project: Project) -> None:
    project.notebook("train.ipynb", "1")
    assert project.grd("research", "train.ipynb").code == 0
    name = project.only_run().name
    for command in ("status", "resume", "stop", "wait", "logs", "events", "result", "rm"):
        assert completions(shell, f"%grd {command} {name[:6]}") == [name], command
    assert completions(shell, "%grd stop last ") and "last" not in completions(shell, "%grd stop last ")
    for which in ("bash", "zsh", "fish"):
        words = {"COMP_WORDS": f"grd status {name[:6]}", "COMP_CWORD": "2" if which != "fish" else name[:6]}
        typed = project.grd(env={"_GRD_COMPLETE": f"{which}_complete", **words})
        assert name in typed.out, (which, typed)
        assert "_GRD_COMPLETE" in project.grd(env={"_GRD_COMPLETE": f"{which}_source"}).out


def test_every_command_is_a_magic_and_speaks_json_or_says_why_not(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    def walk(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from walk(command, f"{path}{name} ")
            else:
                yield f"{path}{name}", command

    reasons = {"events": "as JSON lines", "logs": "no --json", "mcp": "MCP client", "skill show": "no --json"}
    names = []
    for name, command in walk(cli, ""):
        names.append(name)
        assert shell.run_line_magic("grd", f"help {name}") is None
        assert f"Usage: %grd {name}" in capsys.readouterr().out
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options or reasons[name] in " ".join((command.help or "").split()), name
    assert {"research", "status", "config show"} <= set(names)


@pytest.mark.parametrize("line", ["%grd", "%grd help", "%grd -h", "%grd --help", "%grd config"])
def test_help_lists_the_commands(
    shell: InteractiveShell, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.run_cell(line).success
    shown = capsys.readouterr().out
    assert "Usage: %grd" in shown and ("research" in shown or "show" in shown)
    found = shell.object_inspect("%grd")
    assert found["found"] and "Usage: %grd" in found["docstring"] and "%grd help SUB" in found["docstring"]


def test_variables_are_expanded_and_their_values_stay_one_word_in_quotes(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns.update(wanted="no such run", state="failed")
    done = shell.run_cell('%grd status "{wanted}"')
    assert not done.success
    assert "no run 'no such run'" in capsys.readouterr().err
    assert shell.run_cell("found = %grd list --state $state --json").success
    assert shell.user_ns["found"]["total"] == 0


def test_loading_twice_and_unloading_leave_nothing_behind(shell: InteractiveShell) -> None:
    import grd

    first = shell.find_line_magic("grd")
    grd.load_ipython_extension(shell)
    assert shell.find_line_magic("grd") is first
    shell.run_line_magic("reload_ext", "grd")
    assert [type(each).__name__ for each in shell.input_transformers_cleanup].count("AwaitingCells") == 1
    assert completions(shell, "%grd re") == ["research", "resume", "result", "revoke", "recover"]
    shell.run_line_magic("unload_ext", "grd")
    assert shell.find_line_magic("grd") is None and shell.find_cell_magic("grd") is None
    assert "AwaitingCells" not in [type(each).__name__ for each in shell.input_transformers_cleanup]
    assert "research" not in completions(shell, "%grd re") + completions(shell, "x = %grd re")
    grd.unload_ipython_extension(shell)
    shell.run_line_magic("load_ext", "grd")
    assert shell.find_line_magic("grd") is not None


# --- a cell and what it used -------------------------------------------------------------------------------

FULL = "block = bytearray(100 << 20); block[::4096] = b'x' * (100 << 8)"


def test_a_tracked_cell_says_what_it_used_beside_its_value(loaded: Kernel) -> None:
    done = loaded.type(f"%%grd track -o used\n{FULL}\nlen(block) >> 20")
    assert done.ok and done.stdout == "" and len(done.shown) == 2, done
    used, value = done.shown
    assert value["text/plain"] == "100"
    assert re.match(
        r"wall [\d.]+ s, CPU [\d.]+ s .*, peak memory \d+ MiB \(rose by \d+\), ", used["text/plain"]
    )
    assert used["text/html"] == f"<pre>{used['text/plain']}</pre>"
    told = loaded.value("used")
    assert set(told) == documented("grd.track/1")
    assert 100 <= told["memory_rise_mb"] <= 110 <= told["peak_memory_mb"]
    assert told["wall_clock_seconds"] > 0 and told["completed"] is True
    assert told["gpu_available"] or (
        used["text/plain"].endswith("no GPU") and told["gpu_vram_used_mb"] is None
    )
    assert loaded.value("len(block) >> 20") == 100, "its variables are the notebook's"
    assert loaded.type("%%grd track\nblock = None;\nused['schema'];").plain.startswith("wall ")


def test_a_tracked_cell_may_await_and_the_loop_goes_on_meanwhile(loaded: Kernel) -> None:
    loaded.type("import asyncio\nmet = asyncio.Event()\nasync def meet():\n    met.set()\n    return 'met'")
    cell = (
        "%%grd track --json --into used\n"
        "task = asyncio.ensure_future(meet())\n"
        "async with asyncio.timeout(60):\n    await met.wait()\nawait task"
    )
    done = loaded.type(cell)
    assert done.ok and done.plain == "'met'", done
    assert json.loads(done.stdout) == loaded.value("used")
    assert loaded.type("%%grd track\nawait asyncio.sleep(0, 'slept')").shown[1]["text/plain"] == "'slept'"


@pytest.mark.parametrize("wait", ["", "await __import__('asyncio').sleep(0)\n"])
def test_what_a_tracked_cell_raises_passes_and_what_it_used_is_told(loaded: Kernel, wait: str) -> None:
    failed = loaded.type(f"%%grd track -o used\n{wait}divisor = 0\n1 / divisor")
    assert failed.content["ename"] == "ZeroDivisionError"
    trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(failed.errors[0]["traceback"]))
    assert f"{4 if wait else 3} 1 / divisor" in trace, "with its own line, counted as in the cell"
    assert f"Cell In[{failed.content['execution_count']}], line {4 if wait else 3}" in trace
    assert failed.plain.startswith("until it failed: wall ")
    assert loaded.value("[used['completed'], divisor]") == [False, 0]
    broken = loaded.type(f"%%grd track\n{wait}1 +")
    assert broken.content["ename"] == "SyntaxError" and broken.shown == []


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("%%grd research a.ipynb\nran = True", "only %%grd track takes a cell"),
        ("%%grd\nran = True", "only %%grd track takes a cell"),
        ("%%grd track --nope\nran = True", "No such option"),
        ("%%grd track --nope\nran = True\nawait ran", "No such option"),
        ("%%grd track -o 1st\nran = True", "'1st' is no name of a variable"),
        ("%%grd track -o class\nran = True", "'class' is no name of a variable"),
        ("%%grd track -o __builtins__\nran = True", "'__builtins__' is a name of Python's own"),
        ("%%grd track 'unfinished\nran = True", "No closing quotation"),
        ("%grd track", "put %%grd track above"),
    ],
)
def test_a_wrong_cell_magic_is_one_line_and_executes_nothing(loaded: Kernel, cell: str, says: str) -> None:
    failed = loaded.type(cell)
    assert failed.content["ename"] == "UsageError"
    said = failed.stderr.strip().splitlines()
    assert len(said) == 1 and says in said[0], failed
    assert failed.errors == [] and failed.shown == []
    assert loaded.value("'ran' in globals()") is False


def test_a_tracked_cell_is_ipythons_own_language_and_help_executes_nothing(loaded: Kernel) -> None:
    done = loaded.type("%%grd track\nfound = !echo one\n%grd config show --json")
    assert done.ok and '"grd.config/1"' in done.stdout, done
    assert loaded.value("list(found)") == ["one"]
    for body in ("helped = 1", "await helped"):
        shown = loaded.type(f"%%grd track --help\n{body}")
        assert shown.ok and "Usage: %%grd track" in shown.stdout and shown.shown == [], shown
    assert loaded.value("'helped' in globals()") is False
    assert loaded.type("%unload_ext grd").ok
    assert "not found" in loaded.type("%%grd track\nawait x").stderr


# --- awaiting --------------------------------------------------------------------------------------------


def run_script(project: Project, code: str) -> None:
    (project.path / "use.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "use.py"],
        cwd=project.path,
        env={**project.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr


def test_two_awaited_runs_go_side_by_side_and_the_loop_ticks_meanwhile(project: Project) -> None:
    meet = (
        "import time\nfrom pathlib import Path\nPath(mine).touch()\n"
        "while not (Path(other).exists() and Path('tick').exists()):\n    time.sleep(0.05)"
    )
    project.notebook("meet.ipynb", meet, parameters="mine = ''\nother = ''")
    run_script(
        project,
        """
import asyncio
from pathlib import Path
import grd

async def tick():
    # Only a loop that is not blocked opens the way for the two runs.
    while not (Path("a").exists() and Path("b").exists()):
        await asyncio.sleep(0.05)
    Path("tick").touch()

async def both():
    one = grd.aresearch("meet.ipynb", {"mine": "a", "other": "b"}, timeout="5m")
    two = grd.aresearch("meet.ipynb", {"mine": "b", "other": "a"}, timeout="5m")
    first, second, _ = await asyncio.gather(one, two, tick())
    assert (first.state, second.state) == ("completed", "completed"), (first, second)
    again = await grd.aresume(first, {"mine": "c"}, notebook="meet.ipynb", timeout="5m")
    assert (again.id, again.state, again.record.attempt) == (first.id, "completed", 2), again
    try:
        await grd.aresearch("nope.ipynb")
    except grd.GrdError as error:
        assert "nope.ipynb" in str(error)
    else:
        raise SystemExit("no error")
    try:
        await grd.aresearch("meet.ipynb", wait=True)
    except grd.GrdError:
        return
    raise SystemExit("no error for wait")

asyncio.run(both())
""",
    )


@pytest.mark.parametrize("moment", ["training", "starting"])
def test_cancelling_the_task_asks_its_run_to_stop(project: Project, moment: str) -> None:
    project.notebook("train.ipynb", STOPPABLE, parameters=PARAMETERS)
    run_script(
        project,
        f"""
import asyncio
import grd

async def cancel():
    task = asyncio.create_task(grd.aresearch("train.ipynb", timeout="5m"))
    await asyncio.sleep(0)
    if {moment == "training"}:
        while not (runs := grd.list_runs()) or not runs[0].metrics:
            await asyncio.sleep(0.05)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    else:
        raise SystemExit("not cancelled")
    run = grd.status()
    await run.await_end()
    assert (run.state, run.cause) == ("interrupted", "stopped"), run

asyncio.run(cancel())
""",
    )
    assert project.processes() == []

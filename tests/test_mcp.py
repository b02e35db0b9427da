"""``grd mcp`` with the SDK's own client, in memory and over stdio: what an agent does with runs.

GRD_TEST_TRAINING_SECONDS and GRD_TEST_CALL_SECONDS set the length of the training and of a call.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LIMIT_SECONDS, Project, has_ended, wait_until

pytestmark = [pytest.mark.mcp, pytest.mark.timeout(600)]

TRAINING_SECONDS = float(os.environ.get("GRD_TEST_TRAINING_SECONDS", "20"))
CALL_SECONDS = float(os.environ.get("GRD_TEST_CALL_SECONDS", "6"))
EPOCHS = 30
MOST_CALLS = 60

TOOLS = {"run_start", "run_status", "run_wait", "run_logs", "run_stop", "run_resume", "run_result"}

PARAMETERS = "epochs = 3\nseconds = 0.0\nwait_at = -1\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
TRAIN = """
import pathlib, time
from grd.experiment import log_metrics, training
state = {"total": 0.0}
for epoch in training.epochs(epochs, state=state, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    while int(epoch) == wait_at and not pathlib.Path("go").exists():
        time.sleep(0.05)
    time.sleep(seconds)
    state["total"] += int(epoch)
    epoch.log(total=state["total"])
    print("trained", int(epoch), flush=True)
log_metrics(final=state["total"])
"""


@dataclass
class Agent:
    """An agent with the SDK's client, whose tool calls are plain calls here."""

    portal: Any
    client: Any
    heard: list[str] = field(default_factory=list)
    """The texts of progress notifications."""

    def begin(self, tool: str, **arguments: Any) -> Future[Any]:
        """Call a tool and do not wait for its answer."""

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            self.heard.append(message or "")

        return self.portal.start_task_soon(  # type: ignore[no-any-return]
            partial(self.client.call_tool, tool, arguments, progress_callback=hear)
        )

    def answer_of(self, begun: Future[Any]) -> dict[str, Any]:
        answer = begun.result(LIMIT_SECONDS)
        assert not answer.is_error, answer.content[0].text
        assert json.loads(answer.content[0].text) == answer.structured_content
        return dict(answer.structured_content)

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """What a tool answers."""
        return self.answer_of(self.begin(tool, **arguments))

    def refused(self, tool: str, **arguments: Any) -> str:
        """The error that a tool answers with."""
        answer = self.begin(tool, **arguments).result(LIMIT_SECONDS)
        assert answer.is_error, answer.structured_content
        return str(answer.content[0].text)

    def go_on(self, answer: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Make the call that an answer names."""
        assert answer["next"]["tool"] in TOOLS, answer["next"]
        return self.call(answer["next"]["tool"], **{**answer["next"]["arguments"], **more})

    def wait(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Wait by the calls that the answers name, until the run has ended; the last answer."""
        give_up = time.monotonic() + LIMIT_SECONDS
        while answer["next"]["tool"] == "run_wait":
            answer = self.go_on(answer, seconds=5)
            assert time.monotonic() < give_up, answer
        return answer


@contextlib.contextmanager
def talking_to(server: Any) -> Iterator[Agent]:
    from anyio.from_thread import start_blocking_portal
    from mcp import Client

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(server)) as client,
    ):
        yield Agent(portal, client)


@contextlib.contextmanager
def over_stdio(project: Project) -> Iterator[Agent]:
    """A client that starts ``grd mcp`` in another folder and names the project."""
    from mcp import StdioServerParameters
    from mcp.client.stdio import stdio_client

    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "grd", "mcp", "--project", str(project.path)],
        env=project.environment,
        cwd=project.path.parent,
    )
    with (
        open(project.path.parent / "server.log", "a") as log,
        talking_to(stdio_client(parameters, errlog=log)) as agent,
    ):
        yield agent


@pytest.fixture
def in_memory(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    from grd.interfaces.mcp.server import build

    for name in [name for name in os.environ if name.startswith("GRD_")]:
        monkeypatch.delenv(name)
    for name in ("GRD_STATE_DIR", "XDG_CONFIG_HOME", "IPYTHONDIR"):
        monkeypatch.setenv(name, project.environment[name])
    monkeypatch.chdir(project.path)
    with talking_to(build()) as agent:
        yield agent


@pytest.fixture(params=["memory", "stdio"])
def agent(request: pytest.FixtureRequest, project: Project) -> Iterator[Agent]:
    if request.param == "memory":
        yield request.getfixturevalue("in_memory")
    else:
        with over_stdio(project) as talking:
            yield talking


def servers() -> list[psutil.Process]:
    """The servers that this test has started."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if not has_ended(child) and child.cmdline()[1:4] == ["-m", "grd", "mcp"]
    ]


def release(project: Project) -> None:
    """Let the training go on that waits at an epoch."""
    (project.path / "go").touch()


def test_the_tools_are_these_seven_and_none_agrees_to_anything(agent: Agent) -> None:
    listed = agent.portal.call(agent.client.list_tools).tools
    assert {tool.name for tool in listed} == TOOLS
    for tool in listed:
        assert 50 < len(tool.description) < 700, tool.name
        words = json.dumps([tool.name, tool.input_schema]).lower()
        assert not any(word in words for word in ("approv", "grant", "agree")), tool.name


def test_the_next_calls_lead_from_the_start_to_the_result(agent: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert agent.call("run_status")["next"]["tool"] == "run_start"
    started = agent.call("run_start", notebook="train.ipynb", parameters={"epochs": 4}, timeout="1h")
    assert (started["state"], started["attempt"], started["parameters"]["epochs"]) == ("queued", 1, 4)
    ended = agent.wait(started)
    assert (ended["ended"], ended["runs"][0]["state"]) == (True, "completed")
    result = agent.go_on(ended)
    assert result["metrics"] == {"total": 6.0, "final": 6.0}
    assert [row["epoch"] for row in result["history"]] == [0, 1, 2, 3]
    assert result["run_id"] == started["run_id"] == project.only_run().name
    assert result["next"]["tool"] is None
    assert "trained 3\n" in agent.call("run_logs", run=started["run_id"])["text"]
    assert agent.call("run_status")["completed"] == 1
    runner = project.record()["runner"]["pid"]
    wait_until(lambda: not psutil.pid_exists(runner), "the end of the runner, which no zombie may outlast")


def test_an_interrupted_run_goes_on_by_the_call_that_the_wait_names(agent: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    started = agent.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout=3)
    ended = agent.wait(started)
    (run,) = ended["runs"]
    assert (run["state"], run["cause"], run["resumable"]) == ("interrupted", "deadline", True)
    assert (ended["next"]["tool"], ended["next"]["arguments"]) == ("run_resume", {"run": run["run_id"]})
    listed = agent.call("run_status")
    assert [entry["run_id"] for entry in listed["resumable"]["runs"]] == [run["run_id"]]
    release(project)
    resumed = agent.go_on(ended, timeout="1h")
    assert (resumed["attempt"], resumed["state"]) == (2, "queued")
    ended = agent.wait(resumed)
    assert ended["runs"][0]["state"] == "completed"
    assert [row["epoch"] for row in agent.go_on(ended)["history"]] == [0, 1, 2]


def test_a_failed_run_goes_on_with_the_corrected_notebook(in_memory: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, "raise ZeroDivisionError('x' * 50_000)", parameters=PARAMETERS)
    ended = in_memory.wait(in_memory.call("run_start", notebook="train.ipynb", timeout="1h"))
    assert (ended["runs"][0]["state"], ended["next"]["tool"]) == ("failed", "run_logs")
    assert "ZeroDivisionError: xxx" in ended["runs"][0]["detail"]
    assert len(json.dumps(ended)) < 5_000
    logs = in_memory.call("run_logs", run=ended["runs"][0]["run_id"], max_bytes=10**9)
    assert logs == in_memory.go_on(ended, max_bytes=10**9)
    assert "xxx" in logs["text"]
    assert "\x1b" not in logs["text"]
    assert "run_resume with that notebook" in ended["next"]["why"]
    project.notebook("fixed.ipynb", TRAIN, parameters=PARAMETERS)
    resumed = in_memory.call("run_resume", run=logs["run_id"], notebook="fixed.ipynb")
    assert in_memory.wait(resumed)["runs"][0]["state"] == "completed"


def test_where_only_a_person_can_agree_no_tool_is_named(
    in_memory: Agent, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRD_DEFAULT_TIMEOUT", "2s")
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    started = in_memory.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1})
    ended = in_memory.wait(started)
    assert ended["runs"][0]["cause"] == "approval_required"
    assert ended["next"]["tool"] is None
    assert "ask the person" in ended["next"]["why"]
    assert f"grd resume {started['run_id']}" in ended["next"]["why"]
    refusal = in_memory.refused("run_resume", run=started["run_id"])
    assert "only a person can agree to that" in refusal


def test_errors_say_what_is_wrong_and_what_to_do_and_leave_nothing(agent: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    for tool in ("run_status", "run_logs", "run_stop", "run_resume", "run_result"):
        assert "run_status without a run" in agent.refused(tool, run="nowhere")
    assert "run_status without a run" in agent.refused("run_wait", runs=["nowhere"])
    assert "name one at least" in agent.refused("run_wait", runs=[])
    assert "the project's folder" in agent.refused("run_start", notebook="nowhere.ipynb")
    for parameters, expected in (
        ({"lrr": 1}, "lrr"),
        ({"epochs": "many"}, "epochs"),
        ({"timeout": 5}, "timeout"),
    ):
        text = agent.refused("run_start", notebook="train.ipynb", parameters=parameters)
        assert expected in text, text
    assert "write 90s" in agent.refused("run_start", notebook="train.ipynb", timeout="soon")
    for answer in (
        agent.refused("run_start", notebook="train.ipynb", parameters="lr"),
        agent.refused("run_start"),
        agent.refused("run_start", notebook="train.ipynb", budget="never"),
    ):
        assert "Traceback" not in answer
    assert project.run_folders() == []


def test_a_misspelt_argument_and_a_truth_for_a_number_are_refused_by_name(
    agent: Agent, project: Project
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    for wrong in (
        {"timeuot": "1h"},
        {"timeout": True},
        {"budget": False},
        {"key": True},
        {"gpus": False},
        {"max_attempts": True},
    ):
        (name,) = wrong
        text = agent.refused("run_start", notebook="train.ipynb", **wrong)
        assert name in text and "Traceback" not in text, text
    assert "seconds" in agent.refused("run_wait", runs=["last"], seconds=True)
    assert "tail" in agent.refused("run_logs", run="last", tail=True)
    assert project.run_folders() == []
    started = agent.call(
        "run_start", notebook="train.ipynb", parameters={"epochs": 1}, timeout=60, allow_unknown=False
    )
    assert started["timeout"] == 60


def test_what_grd_did_not_foresee_is_told_too(in_memory: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    from grd.interfaces.mcp import tools

    def broken(*_: Any) -> None:
        raise LookupError("nobody thought of this")

    monkeypatch.setattr(tools, "runs_folder", broken)
    text = in_memory.refused("run_status")
    assert "LookupError: nobody thought of this" in text
    assert "Traceback" not in text


def test_one_key_is_one_run_however_often_and_by_whomever_it_is_started(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    request = {"notebook": "train.ipynb", "parameters": {"wait_at": 1}, "timeout": "1h", "key": "one"}
    with over_stdio(project) as first, over_stdio(project) as second:
        assert len(servers()) == 2
        begun = [first.begin("run_start", **request), second.begin("run_start", **request)]
        ids = {agent.answer_of(call)["run_id"] for agent, call in zip((first, second), begun, strict=True)}
        assert ids == {project.only_run().name}
        again = second.call("run_start", **request)
        assert "attached" in again["notes"][0]
        other = second.refused("run_start", **{**request, "parameters": {"wait_at": 2}})
        assert "take another key" in other
        release(project)
        ended = [first.wait(again), second.wait(again)]
        assert {answer["runs"][0]["state"] for answer in ended} == {"completed"}
        shown = first.call("run_start", **request)
        assert (shown["state"], shown["attempt"], shown["next"]["tool"]) == ("completed", 1, "run_result")
    wait_until(lambda: not servers(), "the end of the servers")


def test_logs_are_cut_to_their_end_and_say_how_much_is_missing(in_memory: Agent, project: Project) -> None:
    project.notebook("loud.ipynb", "for n in range(3000): print(f'line {n} häh')")
    run = in_memory.wait(in_memory.call("run_start", notebook="loud.ipynb", timeout="1h"))["runs"][0][
        "run_id"
    ]
    whole = project.grd("logs", run).out
    for arguments, most in (
        ({}, 10_000),
        ({"max_bytes": 1003, "tail": 10**9}, 1003),
        ({"max_bytes": 10**9, "tail": 10**9}, 30_000),
    ):
        logs = in_memory.call("run_logs", run=run, **arguments)
        text = logs["text"]
        assert whole.endswith(text)
        assert text.endswith("line 2999 häh\n")
        assert len(text.encode()) <= most
        assert logs["bytes_left_out"] == len(whole.encode()) - len(text.encode())
        assert logs["lines_left_out"] + logs["lines"] in (3000, 3001)  # a line may have been cut in two
        assert Path(logs["file"]).exists()
    assert in_memory.call("run_logs", run=run, tail=2)["text"] == "line 2998 häh\nline 2999 häh\n"
    assert in_memory.call("run_logs", run=run, tail=0)["text"] == ""
    assert in_memory.call("run_logs", run=run, source="runner")["file"].endswith("runner.log")
    assert "negative" in in_memory.refused("run_logs", run=run, tail=-1)


def test_a_stopped_run_has_saved_and_can_be_resumed(agent: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    started = agent.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout="1h")
    project.wait_for_output("trained 0")
    asked = agent.call("run_stop", run=started["run_id"])
    release(project)
    assert asked["asked"] is True
    ended = (
        agent.wait(asked)
        if asked["next"]["tool"] == "run_wait"
        else agent.call("run_wait", runs=started["run_id"])
    )
    assert (ended["runs"][0]["state"], ended["runs"][0]["cause"]) == ("interrupted", "stopped")
    assert ended["runs"][0]["checkpoint"]["epoch"] >= 0
    assert ended["next"]["tool"] == "run_resume"
    again = agent.call("run_stop", run=started["run_id"])
    assert again["asked"] is False
    assert "not running" in again["notes"][0]


def test_a_run_and_its_agents_survive_the_kill_of_the_server(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    with contextlib.suppress(Exception), over_stdio(project) as agent:  # the client notices, somehow
        run = agent.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout="1h")[
            "run_id"
        ]
        waiting = agent.begin("run_wait", runs=[run], seconds=50)
        (server,) = servers()
        server.kill()
        with pytest.raises(Exception, match=r"[Cc]losed"):
            waiting.result(LIMIT_SECONDS)
    project.wait_for_output("trained 0")
    release(project)
    with over_stdio(project) as next_one:
        ended = next_one.wait(next_one.call("run_wait", runs=[run]))
        assert ended["runs"][0]["state"] == "completed"
        assert next_one.go_on(ended)["attempts"] == 1


def test_the_server_answers_while_somebody_waits_and_tells_how_far_it_is(
    in_memory: Agent, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grd.interfaces.mcp import tools

    monkeypatch.setattr(tools, "NOTIFY_SECONDS", 0.1)
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    started = in_memory.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout="1h")
    waiting = in_memory.begin("run_wait", runs=[started["run_id"]], seconds=50)
    project.wait_for_output("trained 0")
    wait_until(lambda: any("epochs 1" in text for text in in_memory.heard), "word of the first epoch")
    shown = in_memory.call("run_status", run=started["run_id"])
    assert (shown["state"], waiting.done()) == ("running", False)
    release(project)
    assert in_memory.answer_of(waiting)["ended"] is True


def test_a_wait_is_never_longer_than_clients_allow_and_says_so(
    in_memory: Agent, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grd.interfaces.mcp import answers

    assert answers.LONGEST_WAIT_SECONDS == 50
    monkeypatch.setattr(answers, "LONGEST_WAIT_SECONDS", 1.0)
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    run = in_memory.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout="1h")[
        "run_id"
    ]
    cut = in_memory.call("run_wait", runs=[run], seconds=100 * LIMIT_SECONDS)
    assert cut["ended"] is False
    assert cut["next"] == {
        "tool": "run_wait",
        "arguments": {"runs": [run]},
        "why": "not all have ended: ask again, the runs go on",
    }
    assert "cut to 1" in cut["note"]
    assert in_memory.call("run_wait", runs=[run], seconds=0)["note"] is None
    as_asked = {"runs": [run], "seconds": 0.5, "any_of": True}
    assert in_memory.call("run_wait", **as_asked)["next"]["arguments"] == as_asked, "its calls may be cut"
    assert "no time to wait" in in_memory.refused("run_wait", runs=[run], seconds=-1)
    release(project)
    monkeypatch.setattr(answers, "LONGEST_WAIT_SECONDS", 50.0)
    late = in_memory.wait(cut)
    assert late["ended"] is True


def test_a_client_that_cancels_ends_its_wait(
    in_memory: Agent, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grd.interfaces.mcp import tools

    looked: list[str] = []
    look = tools.is_under_way
    monkeypatch.setattr(tools, "is_under_way", lambda folder: looked.append(folder.run_id) or look(folder))
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    first, second = (
        in_memory.call("run_start", notebook="train.ipynb", parameters={"wait_at": 0}, timeout="1h")["run_id"]
        for _ in range(2)
    )
    waiting = in_memory.begin("run_wait", runs=[first], seconds=50)
    wait_until(lambda: looked.count(first) > 1, "a look at the first run")
    waiting.cancel()
    in_memory.call("run_status")
    before = looked.count(first)
    in_memory.call("run_wait", runs=[second], seconds=1)
    assert looked.count(second) > 1
    assert looked.count(first) <= before + 1
    release(project)
    assert in_memory.wait(in_memory.call("run_wait", runs=[first, second]))["ended"] is True


def test_one_of_several_runs_can_be_waited_for(in_memory: Agent, project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    slow = in_memory.call("run_start", notebook="train.ipynb", parameters={"wait_at": 1}, timeout="1h")[
        "run_id"
    ]
    quick = in_memory.call("run_start", notebook="train.ipynb", timeout="1h")["run_id"]
    first = {"next": {"tool": "run_wait", "arguments": {"runs": [slow, quick]}}}
    ended = in_memory.go_on(first, any_of=True, seconds=50)
    assert [run["state"] for run in ended["runs"]] == ["running", "completed"]
    assert ended["next"]["arguments"] == {"runs": [slow], "seconds": 50}
    release(project)
    assert in_memory.wait(ended)["next"]["tool"] == "run_result"


def test_the_record_is_a_resource(agent: Agent, project: Project) -> None:
    project.notebook("plain.ipynb", "print(1)")
    run = agent.wait(agent.call("run_start", notebook="plain.ipynb", timeout="1h"))["runs"][0]["run_id"]
    read = agent.portal.call(agent.client.read_resource, f"grd://runs/{run}/record")
    record = json.loads(read.contents[0].text)
    assert (record["schema"], record["run_id"], record["state"]) == ("grd.run/1", run, "completed")
    with pytest.raises(Exception, match="run_status without a run"):
        agent.portal.call(agent.client.read_resource, "grd://runs/nowhere/record")


@dataclass
class Wire:
    """``grd mcp`` spoken to line by line, without a client between."""

    process: subprocess.Popen[bytes]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def send(self, method: str, ident: int | None = None, **params: Any) -> None:
        assert self.process.stdin is not None
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        self.process.stdin.write(
            json.dumps(message if ident is None else {**message, "id": ident}).encode() + b"\n"
        )
        self.process.stdin.flush()

    def answer(self, ident: int) -> dict[str, Any]:
        """Reads on until the answer to a request; every line must be the protocol's."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.lines.append(json.loads(line))
            assert self.lines[-1]["jsonrpc"] == "2.0"
            if self.lines[-1].get("id") == ident:
                return self.lines[-1]
        pytest.fail(f"the server has ended: {self.process.wait()}")


@pytest.fixture
def wire(project: Project) -> Iterator[Wire]:
    process = subprocess.Popen(
        [sys.executable, "-m", "grd", "mcp"],
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    spoken = Wire(process)
    spoken.send(
        "initialize",
        1,
        protocolVersion="2025-06-18",
        capabilities={},
        clientInfo={"name": "by hand", "version": "1"},
    )
    assert spoken.answer(1)["result"]["serverInfo"]["name"] == "grd"
    spoken.send("notifications/initialized")
    yield spoken
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def close_stdin(wire: Wire) -> None:
    assert wire.process.stdin is not None
    wire.process.stdin.close()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (close_stdin, 0),
        (lambda wire: wire.process.terminate(), -signal.SIGTERM),
        (lambda wire: wire.process.send_signal(signal.SIGINT), -signal.SIGINT),
    ],
    ids=["end of stdin", "SIGTERM", "SIGINT"],
)
def test_the_server_ends_at_once_also_while_somebody_waits_and_its_runs_go_on(
    wire: Wire, project: Project, end: Callable[[Wire], None], code: int
) -> None:
    project.notebook("train.ipynb", "print('to be seen', flush=True)", TRAIN, parameters=PARAMETERS)
    wire.send(
        "tools/call",
        2,
        name="run_start",
        arguments={"notebook": "train.ipynb", "parameters": {"wait_at": 1}, "timeout": "1h"},
    )
    run = wire.answer(2)["result"]["structuredContent"]["run_id"]
    wire.send("tools/call", 3, name="run_wait", arguments={"runs": [run], "seconds": 50})
    project.wait_for_output("trained 0")
    wire.send("tools/call", 4, name="run_logs", arguments={"run": run})
    assert "to be seen" in wire.answer(4)["result"]["structuredContent"]["text"]
    assert wire.process.stdout is not None and wire.process.stderr is not None
    began = time.monotonic()
    end(wire)
    assert wire.process.wait(LIMIT_SECONDS) == code
    assert time.monotonic() - began < 20, "it waited for the call to end"
    for line in wire.process.stdout.read().splitlines():
        assert json.loads(line)["jsonrpc"] == "2.0"
    assert wire.process.stderr.read() == b""
    release(project)
    assert project.grd("wait", run, "--timeout", "100").code == 0


def test_a_client_that_no_longer_reads_ends_the_server_quietly(wire: Wire) -> None:
    assert wire.process.stdout is not None and wire.process.stderr is not None
    wire.process.stdout.close()
    wire.send("tools/call", 2, name="run_status", arguments={})
    assert wire.process.wait(LIMIT_SECONDS) == -signal.SIGPIPE
    assert wire.process.stderr.read() == b""


def test_looking_from_the_command_line_does_not_load_the_sdk(project: Project) -> None:
    code = "import sys\nfrom grd.interfaces.cli.main import main\ntry: main(['status'])\n"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}except SystemExit: print('mcp' in sys.modules, 'anyio' in sys.modules)",
        ],
        cwd=project.path,
        env=project.environment,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.timeout(900)
def test_a_training_that_is_longer_than_all_calls_is_followed_to_its_end_in_short_calls(
    project: Project,
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    request = {
        "notebook": "train.ipynb",
        "parameters": {"epochs": EPOCHS, "seconds": TRAINING_SECONDS / EPOCHS},
        "timeout": "1h",
        "key": "agent",
    }
    with over_stdio(project) as agent:
        answer = agent.call("run_start", **request)
        calls: list[float] = []
        while answer["next"]["tool"] == "run_wait":
            began = time.monotonic()
            answer = agent.go_on(answer, seconds=CALL_SECONDS)
            calls.append(time.monotonic() - began)
            assert len(calls) < MOST_CALLS
        assert answer["runs"][0]["state"] == "completed"
        result = agent.go_on(answer)
        print(f"{len(calls)} calls of {', '.join(f'{call:.1f}' for call in calls)} s")
        assert len(calls) >= TRAINING_SECONDS / CALL_SECONDS - 1
        assert max(calls) < CALL_SECONDS + 10
        assert any("epochs" in text for text in agent.heard)
        assert agent.call("run_start", **request)["run_id"] == result["run_id"]
    assert (result["state"], result["attempts"]) == ("completed", 1)
    assert [row["epoch"] for row in result["history"]] == list(range(EPOCHS))
    assert result["metrics"]["final"] == sum(range(EPOCHS))
    assert project.processes() == []

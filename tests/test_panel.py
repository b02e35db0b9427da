"""The panel without a browser: what it decides, its messages in a real kernel, and where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until, write_notebook
from nvml_replay import BUSY_WITH_HOST_PIDS, H200, LAPTOP, Machine, process
from test_magics import ROOT, Kernel, kernel, loaded  # noqa: F401

from grd.agreement.grants import Place
from grd.estimation.estimate import LOW, Estimate
from grd.interfaces.cli.rendering import describe_end
from grd.interfaces.panel import scene
from grd.interfaces.panel.markup import html_of, text_of
from grd.steps.agreeing import Question
from grd.tracking.gpu_held import warning_of_this_process

LINE = "%grd research train.ipynb -p epochs 40"
QUESTION = Question(
    place=Place(project="/home/ada/digits", notebook="/home/ada/digits/nets/train.ipynb"),
    estimate=Estimate(
        seconds=3600.0, low=1200.0, high=7190.0, method="history", basis="1 completed run", confidence=LOW
    ),
    high=7190.0,
    otherwise=600.0,
)
RUNNING: dict[str, Any] = {
    "run_id": "20261127-210620-train-b7e0", "state": "running", "cause": None, "attempt": 1, "grace": 30.0,
    "folder": "/home/ada/digits/experiments/r", "budget": {"seconds": 7200.0, "agreed": "typed"},
    "progress": {"name": "epochs", "n": 10, "total": 40, "eta_seconds": 90.0, "eta_low_seconds": 60.0,
                 "eta_high_seconds": 120.0, "per_second": 0.33},
    "resources": {"peak_memory_bytes": 2_000_000, "processes": 1, "rss_bytes": 1_000_000, "mean_cores": 0.9},
    "metrics": {"loss": 0.25}, "runner": {"pid": 7, "host": "here"}, "warnings": ["<b>slow</b> disk"],
    "checkpoint": {"epoch": 9, "step": None, "path": "/home/ada/digits/experiments/r/checkpoints/c9.pt"},
}  # fmt: skip


def shown(value: dict[str, Any], **facts: Any) -> scene.Scene:
    return scene.of_run(value, **{"under_way": True, "now": "21:06:23", **facts})


# --- what is decided


def test_the_question_says_what_each_button_agrees_to() -> None:
    asked = scene.of_question(QUESTION, LINE, ["this process holds GPU memory"])
    assert asked.title == "nets/train.ipynb"
    assert asked.state == "may take long: about 1h (20m to 2h)"
    assert [button.word for button in asked.buttons] == ["yes", "session", "capped", "no"]
    assert all(button.hint and not button.disabled for button in asked.buttons)
    rows = dict(asked.rows)
    assert rows["approve"].startswith("2h, ") and rows["session"].startswith("4h, ")
    assert "10m" in rows["capped"] and "GPU memory" in rows["warning"]
    text = text_of(asked)
    for typed in (f"{LINE} --budget 2h", "%grd approve --total 4h --until 4h", f"{LINE} --budget 10m"):
        assert typed in text
    clicked = scene.of_answer(asked, "yes")
    assert clicked.state == "starting" and all(button.disabled for button in clicked.buttons)
    declined = scene.of_nothing(asked, "declined", LINE)
    assert declined.buttons == () and not declined.can_change and LINE in text_of(declined)


def test_a_run_is_told_in_the_words_of_status() -> None:
    running = shown(RUNNING)
    status = "\n".join(describe_end(RUNNING))
    for name, text in running.rows:
        assert name == "agreed" or text in status.replace(f"{RUNNING['folder']}/", ""), (name, text)
    assert dict(running.rows)["progress"] == "epochs 10/40, about 1m 30s left (1m to 2m)"
    assert dict(running.rows)["agreed"] == "by a person, 2h for all attempts together"
    assert (running.state, running.fraction, running.can_change) == ("running", 0.25, True)
    assert "&lt;b&gt;slow&lt;/b&gt; disk" in html_of(running) and "<b>slow" not in html_of(running)


def test_only_what_can_be_done_has_a_button() -> None:
    assert [(each.word, each.disabled) for each in shown(RUNNING).buttons] == [("stop", False)]
    stopping = shown(RUNNING, stopping="stopped")
    assert [(each.label, each.disabled) for each in stopping.buttons] == [("Stopping", True)]
    assert "up to 30s to save" in dict(stopping.rows)["stopping"]
    granted = {**RUNNING, "budget": {**RUNNING["budget"], "agreed": "grant", "grant": "3f9a1c"}}
    assert [(each.word, each.disabled) for each in shown(granted, revocable=True).buttons] == [
        ("stop", False),
        ("revoke", False),
    ]
    assert [each.disabled for each in shown(granted).buttons] == [False, True]
    assert "3f9a1c" in dict(shown(granted).rows)["agreed"]
    for state, cause, mood in (
        ("completed", None, scene.GOOD),
        ("failed", "notebook_error", scene.BAD),
        ("interrupted", "revoked", scene.INTERRUPTED),
    ):
        ended = shown(
            {**granted, "state": state, "cause": cause, "resume_command": "grd resume r"}, under_way=False
        )
        assert (ended.mood, ended.buttons, ended.can_change, ended.as_of) == (mood, (), False, None)
        assert dict(ended.rows)["next"] == "%grd resume r"
    saving = shown({**RUNNING, "state": "completed"}, under_way=True)
    assert saving.buttons == () and saving.can_change, "its runner has not ended yet"


def test_a_kernel_that_holds_gpu_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def warning(*devices: Any) -> str | None:
        monkeypatch.setitem(sys.modules, "pynvml", Machine(list(devices)).module())
        return warning_of_this_process()

    mine = process(os.getpid(), 9000)
    held = warning(H200, H200.but(GetComputeRunningProcesses=[process(1, 7), mine], GetUUID="GPU-2"))
    assert held is not None
    assert "NVIDIA H200 (GPU-2): 9000 MiB" in held and held.count("MiB") == 1
    untold = warning(LAPTOP.but(GetComputeRunningProcesses=[process(os.getpid(), None)]))
    assert untold is not None and "how much is not known" in untold
    assert warning(H200) is None and warning() is None
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, device_count=lambda: 1, get_device_name=lambda index: "NVIDIA H200",
        memory_reserved=lambda index: 512 * 1024**2,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    inside = warning(BUSY_WITH_HOST_PIDS)
    assert inside is not None and "NVIDIA H200 (cuda:0): 512 MiB" in inside


# --- in a kernel


PARAMETERS = "epochs = 4\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
TRAIN = """
import time
from grd.experiment import training
for epoch in training.epochs(epochs, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    time.sleep(0.3)
    epoch.log(n=float(epoch))
"""
LONG = "research train.ipynb -p epochs 40000"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def known(project: Project) -> Project:
    """A project in which a short run has shown how long a long one would take."""
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    done = project.grd("research", "train.ipynb")
    assert done.code == 0, done.err
    return project


@pytest.fixture
def attended(loaded: Kernel, known: Project) -> Kernel:  # noqa: F811
    loaded.is_attended = True
    assert loaded.type("from grd.interfaces.panel import panel, watching\nimport ipywidgets, threading").ok
    return loaded


class Buttons:
    """Clicks the buttons of a kernel's widgets, as a front end does: by a message to the widget's comm."""

    def __init__(self, kernel: Kernel) -> None:  # noqa: F811
        self.kernel = kernel

    def listed(self) -> list[list[Any]]:
        """Label, model and whether it is disabled, of every button on a panel; the newest last."""
        found: list[list[Any]] = self.kernel.value(
            "[[b.description, b.model_id, b.disabled] for box in "
            "ipywidgets.widgets.widget._instances.values() if isinstance(box, ipywidgets.HBox) "
            "for b in box.children]"
        )
        return found

    def click(self, *labels: str) -> None:
        """Click the newest buttons with these labels, before the kernel can answer the first click."""
        listed = self.listed()
        for model in [[model for name, model, _ in listed if name == label][-1] for label in labels]:
            content = {"comm_id": model, "data": {"method": "custom", "content": {"event": "click"}}}
            client = self.kernel.client
            client.shell_channel.send(client.session.msg("comm_msg", content))

    def says(self, text: str) -> None:
        """Until a panel says it."""

        def said() -> bool:
            values = self.kernel.value(
                "[w.value for w in ipywidgets.widgets.widget._instances.values() "
                "if isinstance(w, ipywidgets.HTML)]"
            )
            return any(re.search(text, value) for value in values)

        wait_until(said, f"a panel that says {text}")


def runs_of(project: Project) -> list[Path]:
    return [path for path in project.run_folders() if not path.name.startswith(".")]


HOLDS_GPU_MEMORY = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from nvml_replay import H200, Machine, process
busy = H200.but(GetComputeRunningProcesses=[process(os.getpid(), 9000)])
sys.modules["pynvml"] = Machine([busy]).module()
"""


@pytest.mark.faults
def test_a_double_click_starts_one_run_and_stop_ends_it(attended: Kernel, known: Project) -> None:
    buttons = Buttons(attended)
    assert attended.type(HOLDS_GPU_MEMORY).ok
    asked = attended.type(f"run = %grd {LONG}")
    assert asked.ok, asked
    (display,) = asked.shown
    assert WIDGET in display and f"%grd {LONG} --budget" in display["text/plain"]
    assert "holds GPU memory" in display["text/plain"] and "9000 MiB" in display["text/plain"]
    assert len(runs_of(known)) == 1
    early = attended.type("run.state")
    assert not early.ok and "answer in its panel" in early.content["evalue"]
    assert "not started" in attended.type("print(run)").stdout
    buttons.click("Approve", "Approve", "Decline")
    buttons.says(r"epochs [\d.]+/40000, about")
    assert len(runs_of(known)) == 2
    assert attended.value("run.state") == "running"
    assert attended.value("run.record.budget['agreed']") == "typed"
    again = attended.type("%grd status")
    assert WIDGET in again.shown[0] and again.shown[0][WIDGET] == display[WIDGET], "another view of the same"
    buttons.click("Stop", "Stop")
    buttons.says(r"interrupted \(stopped\)")
    assert attended.value("run.cause") == "stopped"
    assert buttons.listed() == []
    wait_until(
        lambda: attended.value("[t.name for t in threading.enumerate() if t.name == 'grd-panels']") == [],
        "the end of the thread that watches",
    )
    assert attended.type("run").shown[0]["text/html"].count("interrupted") == 1
    assert WIDGET not in attended.type("run").shown[0]


@pytest.mark.faults
def test_questions_that_nobody_answers_or_can_click_start_nothing(attended: Kernel, known: Project) -> None:
    buttons = Buttons(attended)
    assert attended.type("panel.ANSWER_SECONDS = 0.2").ok
    assert attended.type(f"late = %grd {LONG}").ok
    buttons.says("nobody has answered within 0.2s: nothing was started")
    assert attended.type("panel.ANSWER_SECONDS = 600").ok
    assert attended.type(f"moved = %grd {LONG}\nimport os; os.chdir('/')").ok
    buttons.click("Approve")
    buttons.says("not started: nothing was started.*working folder was")
    assert attended.type(f"os.chdir({str(known.path)!r})\nimport sys; sys.modules['ipywidgets'] = None").ok
    assert attended.type("sys.modules.pop('grd.interfaces.panel.card')").ok
    text = attended.type(f"plain = %grd {LONG}")
    assert text.ok, text
    assert set(text.shown[0]) == {"text/plain"}
    assert f"%grd {LONG} --budget 10m" in text.shown[0]["text/plain"]
    assert len(runs_of(known)) == 1
    # What it says can be typed, and then it is a run at once.
    typed = attended.type(f"run = %grd {LONG} --budget 10m")
    assert typed.ok, typed
    assert attended.value("run.state") in ("queued", "running")
    assert "%grd status" in typed.shown[0]["text/plain"]
    assert attended.type("%grd stop last --now").ok


@pytest.mark.faults
def test_with_wait_the_question_is_an_input_line(attended: Kernel, known: Project) -> None:
    message = attended.send(f"%grd {LONG} --wait")
    asked = attended.client.get_stdin_msg(timeout=LIMIT_SECONDS)
    assert "y (yes, this run)" in asked["content"]["prompt"]
    attended.client.input("n")
    declined = attended.reply_to(message)
    assert not declined.ok and "declined" in declined.stderr
    assert declined.shown == [] and len(runs_of(known)) == 1


@pytest.mark.faults
@pytest.mark.parametrize("tool", ["papermill", "nbconvert", "execute"])
def test_where_no_front_end_is_there_nothing_asks_and_nothing_hangs(
    tool: str, known: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook(
        known.path / "outer.ipynb",
        "%load_ext grd",
        f"run = %grd {LONG}",
        "print(type(run).__name__, run.record.budget['agreed'], run.record.budget['seconds'])",
        "run.stop(now=True)",
    )
    command = {
        "papermill": ["-m", "papermill", "outer.ipynb", "done.ipynb"],
        "nbconvert": ["-m", "nbconvert", "--to=notebook", "--execute", "outer.ipynb", "--output=done.ipynb"],
        "execute": ["-c", "from nbclient.cli import main; main()", "--output=done", "outer.ipynb"],
    }[tool]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=known.path,
        env=known.environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(known.path / "done.ipynb", as_version=4)
    assert "Run default 600.0" in str(executed.cells[2].outputs)
    assert "widget" not in nbformat.writes(executed)


def test_the_question_in_the_panel_is_the_one_of_the_terminal() -> None:
    from grd.interfaces.cli.asking import lines_of

    lines = "\n".join(lines_of(replace(QUESTION, otherwise=900.0)))
    assert "about 1h (20m to 2h)" in lines and "agrees to 2h" in lines and "stops after 15m" in lines

"""JupyterLab with folders of its own, and a notebook that is opened in it by a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from conftest import LIMIT_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"

LIMIT_MS = LIMIT_SECONDS * 1000
SETTINGS = {
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}


class Lab:
    """A server that reads nothing of the user's and answers on loopback only."""

    def __init__(self, folder: Path, project: Path, environment: dict[str, str]) -> None:
        self.project, self.token = project, secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
        own = {f"JUPYTER_{name}": str(folder / name.lower()) for name in names}
        own |= {
            f"JUPYTERLAB_{name}": str(folder / name.lower()) for name in ("SETTINGS_DIR", "WORKSPACES_DIR")
        }
        for path in own.values():
            Path(path).mkdir(parents=True)
        for name, values in SETTINGS.items():
            plugin = Path(own["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", f"{name}.jupyterlab-settings")
            plugin.parent.mkdir(parents=True, exist_ok=True)
            plugin.write_text(json.dumps(values))
        self.log = folder / "lab.log"
        options = [
            "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={project}", "--ServerApp.terminals_enabled=False", "--LabApp.news_url=",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly",
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                cwd=project,
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        """Until it answers."""

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return bool(self.ask("status"))
            return False

        wait_until(answers, "JupyterLab", pause=0.2)

    def ask(self, what: str, method: str = "GET") -> Any:
        """A request to its own interface."""
        request = urllib.request.Request(
            f"{self.base}/api/{what}", method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
            body = answer.read()
        return json.loads(body) if body else True

    def end_kernels(self) -> None:
        """End every kernel; each opened notebook would keep its own."""
        for session in self.ask("sessions"):
            self.ask(f"sessions/{session['id']}", "DELETE")

    def end(self) -> None:
        """End the server, and its kernels with it."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            self.process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
                return


def kernelspec(folder: Path, name: str, python: str | Path, environment: dict[str, str]) -> None:
    """Write a kernelspec for ``python``."""
    place = folder / "kernels" / name
    place.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": name, "language": "python", "env": environment}
    (place / "kernel.json").write_text(json.dumps(spec))


@dataclass
class Page:
    """A notebook that somebody has opened in the browser."""

    lab: Lab
    page: Any
    name: str

    def open(self) -> None:
        """Open it, or load the page anew; until its kernel answers."""
        self.page.goto(f"{self.lab.base}/lab/tree/{self.name}?reset&token={self.lab.token}")
        self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").first.wait_for(
            timeout=LIMIT_MS
        )
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Until the kernel is idle: one of both signs alone comes before there is a kernel."""
        indicator = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
        self.page.locator(indicator).first.wait_for(state="attached", timeout=LIMIT_MS)
        bar = self.page.locator("#jp-main-statusbar")
        bar.filter(has_text=re.compile(r"\|\s*Idle")).wait_for(timeout=LIMIT_MS)

    def cell(self, index: int) -> Any:
        """A code cell with its output."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").nth(index)

    def execute(self, index: int) -> None:
        """Type Shift+Enter in a cell; until it was executed."""
        cell = self.cell(index)
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.inner_text()

        def pressed() -> bool:
            cell.locator(".cm-content").click()
            self.page.keyboard.press("Shift+Enter")
            with contextlib.suppress(Exception):
                wait_until(lambda: prompt.inner_text() != before, "the prompt", 10)
            return bool(prompt.inner_text() != before)

        wait_until(pressed, f"cell {index}")
        wait_until(lambda: re.search(r"\[\d+\]", prompt.inner_text()), f"the end of cell {index}")

    def says(self, index: int, text: str | re.Pattern[str]) -> Any:
        """The output of a cell, once it says ``text``."""
        output = self.cell(index).locator(".jp-OutputArea-output").filter(has_text=text)
        output.first.wait_for(timeout=LIMIT_MS)
        return output

    def button(self, index: int, label: str) -> Any:
        """A button of the panel below a cell."""
        return self.cell(index).locator("button.jupyter-button").filter(has_text=re.compile(f"^{label}$"))

    def screenshot(self, name: str, index: int | None = None) -> None:
        """Keep a picture: of the whole window, or of a cell."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        where = SCREENSHOTS / f"{name}.png"
        if index is None:
            self.page.screenshot(path=where)
        else:
            self.cell(index).screenshot(path=where)


def write(path: Path, kernel: str, *cells: str) -> None:
    """A notebook for somebody to open."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": kernel, "language": "python", "display_name": kernel}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, path)


def environment_without_grd() -> dict[str, str]:
    """This process's environment, without what tells grd anything."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GRD_")}

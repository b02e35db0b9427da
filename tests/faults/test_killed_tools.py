"""Tools that know nothing of grd run kernels of its kernelspec, and are killed, or end and restart them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from conftest import LIMIT_SECONDS, wait_until, write_notebook
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager, MultiKernelManager
from test_guardian import CHILDREN, KINDS, SLEEPING, living

from grd.execution import kernelspec

pytestmark = pytest.mark.faults

TOOLS = {
    "jupyter execute": ("jupyter", "execute", "in.ipynb", "--kernel_name", "grd-python3"),
    "nbconvert": (
        *("jupyter", "nbconvert", "--to", "notebook", "--execute", "in.ipynb", "--output", "out.ipynb"),
        "--ExecutePreprocessor.kernel_name=grd-python3",
    ),
    "papermill": ("papermill", "in.ipynb", "out.ipynb", "-k", "grd-python3", "--no-progress-bar"),
}
SIGNALS = [signal.SIGTERM, signal.SIGKILL]
GRACE = 20.0
AFTER_GRACE_SECONDS = 2.0

MARK = "print('here', flush=True)\nopen('here', 'w').close()"
FAMILY = f"resume = False\n{CHILDREN}"
SAVING = f"""
import subprocess, time
helper = subprocess.Popen(['sleep', '1000'])
{MARK}
try:
    time.sleep(600)
except KeyboardInterrupt:
    open('saving', 'w').close()
    time.sleep(SECONDS)
    if helper.poll() is None:  # as DataLoader workers are needed for a last evaluation
        open('saved', 'w').close()
    raise
finally:
    helper.kill()
"""
HOLDING_THE_GIL = f"""
import ctypes, time
{MARK}
time.sleep(0.5)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):  # waits for itself: a signal would end a sleep
    ctypes.PyDLL(None).pthread_mutex_lock(mutex)
"""


@dataclass
class Place:
    """A folder with a kernelspec of its own, and where Jupyter keeps its connection files."""

    path: Path
    environment: dict[str, str]

    @property
    def kernels(self) -> Path:
        return self.path / "kernels"

    def start(self, tool: str, grace: float = GRACE) -> subprocess.Popen[bytes]:
        """Start ``tool`` and wait until its notebook's cell says that it is under way."""
        process = subprocess.Popen(
            [sys.executable, "-m", *TOOLS[tool]],
            cwd=self.path,
            env={**self.environment, "GRD_GRACE": f"{grace:g}s"},
            stdin=subprocess.DEVNULL,
            stdout=(self.path / "said").open("wb"),
            stderr=subprocess.STDOUT,
        )

        def under_way() -> bool:
            if process.poll() is not None:
                pytest.fail((self.path / "said").read_text())
            return (self.path / "here").exists()

        wait_until(under_way, "the cell to run")
        return process

    def children(self) -> dict[str, psutil.Process]:
        """What the notebook has started, with its kernel's processes beside it."""
        lines = (self.path / "children").read_text().split("\n")[:-1]
        return {line: psutil.Process(int(line.split()[1])) for line in lines}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")} | {
        "JUPYTER_DATA_DIR": str(tmp_path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    kernelspec.install(tmp_path / "kernels")
    yield Place(tmp_path, environment)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("JUPYTER_DATA_DIR") == str(tmp_path):
                process.kill()


def below(process: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """Guardians and kernel of a tool."""
    found = psutil.Process(process.pid).children(recursive=True)
    return {f"{number} {' '.join(each.cmdline()[-3:])}": each for number, each in enumerate(found)}


def connection_file(processes: dict[str, psutil.Process]) -> Path:
    """The kernel's, as its command names it."""
    command = kernel_of(processes).cmdline()
    return Path(command[command.index("-f") + 1])


def kernel_of(processes: dict[str, psutil.Process]) -> psutil.Process:
    """The kernel, whose guardians name its command too."""
    return next(each for each in processes.values() if each.cmdline()[1:3] == ["-m", "ipykernel_launcher"])


def ends(processes: dict[str, psutil.Process], seconds: float) -> None:
    """None of them is alive after so long."""
    give_up = time.monotonic() + seconds
    while left := living(processes):
        assert time.monotonic() < give_up, f"still alive: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_left_of_a_kernel_whose_tool_is_killed(
    place: Place, tool: str, signum: signal.Signals
) -> None:
    write_notebook(place.path / "in.ipynb", FAMILY, f"{MARK}\n{SLEEPING}")
    process = place.start(tool)
    left = {**below(process), **place.children()}
    assert {name.split()[0] for name in place.children()} == KINDS
    file = connection_file(left)
    assert file.exists()
    process.send_signal(signum)
    ends({**left, "tool": psutil.Process(process.pid)}, GRACE + AFTER_GRACE_SECONDS)
    assert process.wait() != 0
    wait_until(lambda: not file.exists(), "the connection file's end", 10)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_kernel_that_holds_the_gil_ends_with_the_grace(place: Place, signum: signal.Signals) -> None:
    grace = 4.0
    write_notebook(place.path / "in.ipynb", FAMILY, HOLDING_THE_GIL)
    process = place.start("jupyter execute", grace)
    left = {**below(process), **place.children()}
    time.sleep(1.0)  # nothing tells when the GIL is held: whoever could tell needs it
    process.send_signal(signum)
    began = time.monotonic()
    ends(left, 30)
    assert time.monotonic() - began > grace - 1


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_cell_may_save_for_longer_than_jupyters_own_patience(
    place: Place, tool: str, signum: signal.Signals
) -> None:
    write_notebook(place.path / "in.ipynb", SAVING.replace("SECONDS", "7"), "print('never')")
    process = place.start(tool, 60)
    left = below(process)
    process.send_signal(signum)
    wait_until((place.path / "saving").exists, "the KeyboardInterrupt", 30)
    ends(left, 60)
    process.wait()
    assert (place.path / "saved").exists()


def test_nothing_interrupts_a_save_in_the_middle_of_the_grace(place: Place) -> None:
    write_notebook(place.path / "in.ipynb", SAVING.replace("SECONDS", "14"))
    process = place.start("jupyter execute", 24)  # jupyter_client sends SIGTERM after half of it
    process.send_signal(signal.SIGTERM)
    process.wait(LIMIT_SECONDS)
    assert (place.path / "saved").exists()


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_save_is_cut_when_the_grace_is_over(place: Place, signum: signal.Signals) -> None:
    write_notebook(place.path / "in.ipynb", SAVING.replace("SECONDS", "40"))
    process = place.start("jupyter execute", 6)
    left = below(process)
    process.send_signal(signum)
    wait_until((place.path / "saving").exists, "the KeyboardInterrupt", 30)
    ends(left, 25)
    process.wait()
    assert not (place.path / "saved").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_sigterm_to_every_process_at_once_is_one_interrupt(place: Place, tool: str) -> None:
    write_notebook(place.path / "in.ipynb", SAVING.replace("SECONDS", "3"))
    process = place.start(tool, 60)
    left = below(process)
    for each in [*left.values(), process]:
        if not isinstance(each, psutil.Process) or each.name() != "sleep":
            each.send_signal(signal.SIGTERM)
    ends(left, 60)
    process.wait()
    assert (place.path / "saved").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_left_after_a_normal_end(place: Place, tool: str) -> None:
    write_notebook(place.path / "in.ipynb", FAMILY, f"{MARK}\nimport time\ntime.sleep(1)\nprint(6 * 7)")
    process = place.start(tool)
    left = {**below(process), **place.children()}
    file = connection_file(left)
    assert file.exists()
    assert process.wait(LIMIT_SECONDS) == 0, (place.path / "said").read_text()
    ends(left, AFTER_GRACE_SECONDS)
    assert not file.exists()
    if tool != "jupyter execute":
        shown = nbformat.read(place.path / "out.ipynb", as_version=4)
        assert "42" in shown.cells[-1].outputs[-1].text


def test_nothing_is_left_of_a_kernel_that_is_killed_itself(place: Place) -> None:
    write_notebook(place.path / "in.ipynb", FAMILY, f"{MARK}\n{SLEEPING}")
    process = place.start("papermill")
    left = {**below(process), **place.children()}
    kernel_of(left).kill()
    ends(left, AFTER_GRACE_SECONDS + 5)
    assert process.wait(LIMIT_SECONDS) == 138


# --- kernel managers, as servers and front ends use them ----------------------------------------------


class Manager:
    """One kernel of a kernel manager, synchronous or not, as a server drives it."""

    def __init__(self, place: Place, make: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.place = loop, place
        (place.path / "runtime").mkdir()
        specs = KernelSpecManager(kernel_dirs=[str(place.kernels)])
        options: dict[str, Any] = {
            "kernel_spec_manager": specs,
            "connection_dir": str(place.path / "runtime"),
        }
        if issubclass(make, MultiKernelManager):
            self.several = make(**options)
            self.kernel_id = self.call(
                self.several.start_kernel(kernel_name="grd-python3", **self.start_options())
            )
            self.one = self.several.get_kernel(self.kernel_id)
        else:
            self.several = None
            self.one = make(
                kernel_name="grd-python3",
                kernel_spec_manager=specs,
                connection_file=str(place.path / "runtime" / "kernel-1.json"),
            )
            self.call(self.one.start_kernel(**self.start_options()))

    def start_options(self) -> dict[str, Any]:
        environment = {**self.place.environment, "GRD_GRACE": "60s"}
        return {"cwd": str(self.place.path), "env": environment}

    def call(self, value: Any) -> Any:
        return self.loop.run_until_complete(value) if inspect.isawaitable(value) else value

    def ask(self, what: str, **options: Any) -> None:
        """restart_kernel, interrupt_kernel or shutdown_kernel."""
        if self.several is not None:
            self.call(getattr(self.several, what)(self.kernel_id, **options))
        else:
            self.call(getattr(self.one, what)(**options))

    def execute(self, code: str, *, wait: bool = True) -> Any:
        client = self.one.client()
        client.start_channels()
        try:
            self.call(client.wait_for_ready(timeout=LIMIT_SECONDS))
            if wait:
                return self.call(client.execute_interactive(code, timeout=LIMIT_SECONDS, output_hook=print))
            client.execute(code)
            wait_until((self.place.path / "here").exists, "the cell to run")
        finally:
            client.stop_channels()

    def kernel(self) -> psutil.Process:
        return psutil.Process(self.one.provisioner.pid)


MANAGERS = [KernelManager, AsyncKernelManager, MultiKernelManager, AsyncMultiKernelManager]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield made
    asyncio.set_event_loop(None)
    made.close()


@pytest.mark.parametrize("now", [False, True], ids=["politely", "now"])
@pytest.mark.parametrize("make", MANAGERS)
def test_a_kernel_is_restarted_and_shut_down_without_anything_left(
    place: Place, loop: asyncio.AbstractEventLoop, make: Any, now: bool
) -> None:
    manager = Manager(place, make, loop)
    manager.execute(FAMILY)
    first = {**place.children(), "kernel": manager.kernel()}
    assert {name.split()[0] for name in first} == KINDS | {"kernel"}
    manager.ask("restart_kernel", now=now)
    ends(first, AFTER_GRACE_SECONDS)
    assert manager.kernel() != first["kernel"]
    assert manager.execute("resume")["content"]["ename"] == "NameError"
    (place.path / "children").unlink()
    manager.execute(FAMILY)
    second = {**place.children(), "kernel": manager.kernel()}
    file = connection_file(second)
    assert file.exists()
    manager.ask("shutdown_kernel", now=now)
    ends(second, AFTER_GRACE_SECONDS)
    assert not file.exists()


@pytest.mark.parametrize("make", MANAGERS)
def test_an_interrupt_reaches_the_cell_and_not_its_children(
    place: Place, loop: asyncio.AbstractEventLoop, make: Any
) -> None:
    manager = Manager(place, make, loop)
    manager.execute(FAMILY)
    manager.execute(SAVING.replace("SECONDS", "0"), wait=False)
    manager.ask("interrupt_kernel")
    wait_until((place.path / "saved").exists, "the cell's own end")
    assert sorted(living(place.children())) == sorted(place.children())
    assert manager.execute("resume")["content"]["status"] == "ok"
    left = {**place.children(), "kernel": manager.kernel()}
    began = time.monotonic()
    manager.ask("shutdown_kernel")
    assert time.monotonic() - began < 30, "an idle kernel was given the grace of a cell"
    ends(left, AFTER_GRACE_SECONDS)


@pytest.mark.parametrize("what", ["restart_kernel", "shutdown_kernel"])
@pytest.mark.parametrize("make", MANAGERS)
def test_a_server_that_ends_a_kernel_lets_its_cell_save(
    place: Place, loop: asyncio.AbstractEventLoop, make: Any, what: str
) -> None:
    manager = Manager(place, make, loop)
    manager.execute(SAVING.replace("SECONDS", "7"), wait=False)
    kernel = manager.kernel()
    manager.ask(what)
    assert not living({"kernel": kernel})
    assert (place.path / "saved").exists()
    if what == "restart_kernel":
        manager.ask("shutdown_kernel")


def test_a_killed_kernel_that_is_started_again_leaves_nothing_of_its_first_life(
    place: Place, loop: asyncio.AbstractEventLoop
) -> None:
    manager = Manager(place, AsyncIOLoopKernelManager, loop)
    manager.execute(FAMILY)
    first = {**place.children(), "kernel": manager.kernel()}
    first["kernel"].kill()

    async def new_kernel() -> None:
        while manager.one.provisioner.pid == first["kernel"].pid or manager.one.provisioner.process is None:
            await asyncio.sleep(0.1)

    loop.run_until_complete(asyncio.wait_for(new_kernel(), LIMIT_SECONDS))
    ends(first, AFTER_GRACE_SECONDS)
    assert manager.execute("1")["content"]["status"] == "ok"
    left = {"kernel": manager.kernel()}
    manager.ask("shutdown_kernel")
    ends(left, AFTER_GRACE_SECONDS)

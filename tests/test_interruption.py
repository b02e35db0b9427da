"""Signals and stop requests, with real processes, real signals and a real kernel."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grd.errors import ExperimentInterrupted
from grd.experiment import CheckpointHandler, GracefulExperiment, stop_requested
from grd.experiment.interruption import armed, saving

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("GRD_"):
            monkeypatch.delenv(name)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    gc.collect()
    assert {s: signal.getsignal(s) for s in before} == before


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class Script:
    """A Python process that tells when it has come somewhere, by a line of its output."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(code)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}: {self.process.communicate()[1]}")

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


# --- in this process ------------------------------------------------------------------------------------


def test_a_signal_only_sets_the_flag_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ExperimentInterrupted), armed():
        assert stop_requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested() == "sigterm"
        raise ExperimentInterrupted
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop_requested() is None


def test_every_handler_alive_hears_the_signal(tmp_path: Path) -> None:
    first, second = CheckpointHandler(tmp_path / "a"), CheckpointHandler(tmp_path / "b")
    deaf = CheckpointHandler(tmp_path / "c", install_signal_handlers=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert first.check_interrupted() and second.check_interrupted()
    assert first.interrupted and second.interrupted and not deaf.interrupted
    first.close()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    second.close()
    second.close()


def test_a_handler_that_is_gone_holds_no_signal(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    handler = CheckpointHandler(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is not before
    del handler
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is before


def test_reading_hints_takes_no_signal_when_told_so(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    handler = CheckpointHandler(tmp_path, install_signal_handlers=False)
    handler.get_resumability_hints()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_made_in_a_thread_works_without_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tmp_path / "stop.json"
    monkeypatch.setenv("GRD_STOP_FILE", str(stop))
    stop.write_text('{"reason": "budget"}')
    seen: list[Any] = []

    def work() -> None:
        with armed():
            handler = CheckpointHandler(tmp_path / "c")
            handler.save_checkpoint(0, {}, {}, 0.0)
            seen.extend([handler.check_interrupted(), stop_requested()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, "budget"]


def test_the_stop_file_is_seen_within_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = tmp_path / "stop.json"
    monkeypatch.setenv("GRD_STOP_FILE", str(stop))
    handler = CheckpointHandler(tmp_path / "c", install_signal_handlers=False)
    assert not handler.check_interrupted()
    stop.write_text("not json")
    end = time.monotonic() + 10
    while not handler.check_interrupted() and time.monotonic() < end:
        time.sleep(0.01)
    assert handler.interrupted and stop_requested() == "stopped"


def test_the_second_ctrl_c_raises_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), armed():
        signal.raise_signal(signal.SIGINT)
        assert stop_requested() == "sigint"
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")


def test_during_a_save_the_second_ctrl_c_waits_too() -> None:
    reached = False
    with pytest.raises(ExperimentInterrupted), armed():
        with saving():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached = True
        raise ExperimentInterrupted
    assert reached


def test_a_save_that_nobody_watches_over_is_not_cut_either_and_the_signal_comes_after_it(
    tmp_path: Path,
) -> None:
    handler = CheckpointHandler(tmp_path, install_signal_handlers=False)

    class Model:
        def state_dict(self) -> dict[str, int]:
            signal.raise_signal(signal.SIGINT)
            return {"n": 1}

    with pytest.raises(KeyboardInterrupt):
        handler.save_checkpoint(0, Model())
    loaded = handler.load_checkpoint()
    assert loaded is not None and loaded["model_state"] == {"n": 1}


def test_a_stop_while_the_epoch_is_saved_ends_the_loop_and_saves_no_second_time(tmp_path: Path) -> None:
    handler = CheckpointHandler(tmp_path, install_signal_handlers=False)
    saved: list[int] = []

    class Model:
        def state_dict(self) -> dict[str, int]:
            saved.append(len(saved))
            signal.raise_signal(signal.SIGTERM)
            return {}

    experiment = GracefulExperiment(handler)
    with pytest.raises(ExperimentInterrupted):
        experiment.run(lambda epoch: 0.0, 20, model=Model())
    assert (saved, experiment.current_epoch) == ([0], 4)


@pytest.mark.faults
def test_a_process_that_ends_waits_for_a_save_in_a_daemon_thread(tmp_path: Path) -> None:
    script = Script(
        f"""
        import threading, time
        from grd.experiment import CheckpointHandler
        began = threading.Event()
        class Model:
            def state_dict(self):
                began.set()
                time.sleep(1)
                return {{}}
        handler = CheckpointHandler({str(tmp_path)!r})
        handler.save_checkpoint(0)  # nothing can be imported any more once the interpreter ends
        threading.Thread(target=lambda: handler.save_checkpoint(1, Model()), daemon=True).start()
        began.wait()
        """
    )
    assert script.end()[0] == 0
    reader = CheckpointHandler(tmp_path, install_signal_handlers=False)
    assert reader.get_resumability_hints()["latest_epoch"] == 1


def test_a_signal_nobody_honoured_is_delivered_after_the_block() -> None:
    with pytest.raises(KeyboardInterrupt):
        with armed():
            signal.raise_signal(signal.SIGINT)
        time.sleep(5)


def test_a_handler_that_stood_there_before_is_called_too() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1) or sys.exit(3))  # type: ignore[func-returns-value]
    try:
        with contextlib.suppress(ExperimentInterrupted), armed():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested() == "sigterm"
            raise ExperimentInterrupted
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_that_call_each_other_do_not_go_round_for_ever() -> None:
    with contextlib.suppress(ExperimentInterrupted), armed():
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *a: ours(*a))  # type: ignore[operator,misc]
        with contextlib.suppress(ExperimentInterrupted), armed():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested() == "sigterm"
            raise ExperimentInterrupted
        raise ExperimentInterrupted
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert stop_requested() is None


# --- GracefulExperiment ---------------------------------------------------------------------------------


def test_graceful_saves_every_fifth_epoch_and_the_last(tmp_path: Path) -> None:
    handler = CheckpointHandler(tmp_path, install_signal_handlers=False)
    experiment = GracefulExperiment(handler)
    losses = experiment.run(lambda epoch: 1.0 / (epoch + 1), 12, model={"w": 1}, optimizer={})
    assert len(losses) == 12 and experiment.current_epoch == 11
    assert {p.name for p in tmp_path.glob("checkpoint_epoch_*")} == {
        "checkpoint_epoch_4.pt", "checkpoint_epoch_9.pt", "checkpoint_epoch_11.pt",
    }  # fmt: skip
    assert handler.get_resumability_hints()["estimated_remaining_epochs"] == 0


@pytest.mark.parametrize("at", [0, 3])
def test_graceful_saves_what_is_completed_and_raises_on_a_signal(tmp_path: Path, at: int) -> None:
    handler = CheckpointHandler(tmp_path)
    experiment = GracefulExperiment(handler)

    def one_epoch(epoch: int) -> float:
        if epoch == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.5

    with pytest.raises(ExperimentInterrupted) as caught:
        experiment.run(one_epoch, 10)
    assert caught.value.reason == "sigterm" and experiment.interrupted
    loaded = handler.load_checkpoint()
    assert loaded is not None and loaded["epoch"] == at == experiment.current_epoch
    assert loaded["metadata"]["interrupted"] is True
    handler.close()


def test_graceful_interrupted_before_its_first_epoch_saves_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tmp_path / "stop"
    stop.write_text("{}")
    monkeypatch.setenv("GRD_STOP_FILE", str(stop))
    handler = CheckpointHandler(tmp_path / "c", install_signal_handlers=False)
    with pytest.raises(ExperimentInterrupted):
        GracefulExperiment(handler).run(lambda epoch: 0.0, 10)
    assert handler.get_resumability_hints()["next_epoch"] == 0


# --- other processes --------------------------------------------------------------------------------------


def test_a_script_with_a_bare_handler_sees_the_flag_and_the_later_signal_ends_it(tmp_path: Path) -> None:
    script = Script(
        f"""
        import time
        import grd.experiment.interruption as i
        from grd.experiment import CheckpointHandler
        i.SAME_REQUEST_SECONDS = 0.0
        handler = CheckpointHandler({str(tmp_path)!r})
        print("ready")
        while not handler.check_interrupted():
            time.sleep(0.01)
        print("flagged")
        time.sleep(60)
        """
    )
    script.wait_for("ready")
    script.send(signal.SIGTERM)
    script.wait_for("flagged")
    script.send(signal.SIGTERM)
    assert script.end()[0] == -signal.SIGTERM


def test_a_script_whose_handler_is_closed_ends_on_the_first_signal(tmp_path: Path) -> None:
    script = Script(
        f"""
        import time
        from grd.experiment import CheckpointHandler
        CheckpointHandler({str(tmp_path)!r}).close()
        print("ready")
        time.sleep(60)
        """
    )
    script.wait_for("ready")
    script.send(signal.SIGTERM)
    assert script.end()[0] == -signal.SIGTERM


def test_a_forked_child_ends_on_sigterm_while_the_parent_is_armed() -> None:
    script = Script(
        """
        import os, signal, time
        from grd.experiment.interruption import armed, stop_requested
        with armed():
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(1)
            os.kill(child, signal.SIGTERM)
            print(os.waitpid(child, 0)[1], stop_requested())
        """
    )
    assert script.end()[1].split() == [str(int(signal.SIGTERM)), "None"]


def test_a_caught_sigterm_shows_in_the_process_status_only_while_armed() -> None:
    script = Script(
        """
        from grd.experiment.interruption import armed
        def caught():
            line = next(l for l in open("/proc/self/status") if l.startswith("SigCgt"))
            return bool(int(line.split()[1], 16) >> 14 & 1)
        with armed():
            print(caught())
        print(caught())
        """
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    assert script.end()[1].split() == ["True", "False"]


# --- a real kernel ------------------------------------------------------------------------------------------


class Kernel:
    """A real ipykernel, driven by messages."""

    def __init__(self, folder: Path) -> None:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(folder), env=environment())
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)  # type: ignore[union-attr]

    def start(self, code: str) -> str:
        return str(self.client.execute(textwrap.dedent(code)))

    def wait_for_output(self, text: str) -> None:
        collected = ""
        while text not in collected:
            message = self.client.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream":
                collected += message["content"]["text"]

    def reply(self, request: str) -> dict[str, Any]:
        while True:
            message = self.client.get_shell_msg(timeout=60)
            if message["parent_header"].get("msg_id") == request:
                content: dict[str, Any] = message["content"]
                break
        while True:  # the cell is over once the kernel says that it is idle again
            message = self.client.get_iopub_msg(timeout=60)
            if (
                message["msg_type"] == "status"
                and message["content"]["execution_state"] == "idle"
                and message["parent_header"].get("msg_id") == request
            ):
                return content

    def has_ended(self) -> bool:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if not self.manager.is_alive():
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self.client.stop_channels()
        with contextlib.suppress(Exception):
            self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    try:
        yield kernel
    finally:
        kernel.close()


LOOP = """
import time
from grd.experiment import training
state = {"n": 0}
for epoch in training.epochs(1000, state=state, checkpoint_dir="checkpoints", resume=RESUME):
    for step in epoch.steps(range(1000)):
        state["n"] += 1
        if state["n"] == FIRST + 3:
            print("in the loop", flush=True)
        time.sleep(0.005)
"""


def loop(resume: bool, first: int = 0) -> str:
    return LOOP.replace("RESUME", str(resume)).replace("FIRST", str(first))


@pytest.mark.faults
def test_sigterm_in_a_kernels_training_saves_and_raises_and_the_next_one_ends_the_idle_kernel(
    kernel: Kernel, tmp_path: Path
) -> None:
    request = kernel.start(loop(resume=False))
    kernel.wait_for_output("in the loop")
    os.kill(kernel.pid, signal.SIGTERM)
    reply = kernel.reply(request)
    assert (reply["status"], reply["ename"]) == ("error", "ExperimentInterrupted")
    hints = CheckpointHandler(
        tmp_path / "checkpoints", install_signal_handlers=False
    ).get_resumability_hints()
    assert hints["has_checkpoint"] and hints["step"] >= 3

    # SIGINT is reset by the kernel around every cell: the second cell must hear it again.
    request = kernel.start(loop(resume=True, first=hints["step"]))
    kernel.wait_for_output("in the loop")
    os.kill(kernel.pid, signal.SIGINT)
    reply = kernel.reply(request)
    assert reply["ename"] == "ExperimentInterrupted" and "sigint" in reply["evalue"]

    os.kill(kernel.pid, signal.SIGTERM)
    assert kernel.has_ended()


@pytest.mark.faults
def test_an_idle_kernel_ends_on_sigterm_although_a_handler_is_alive(kernel: Kernel) -> None:
    request = kernel.start(
        """
        from grd.experiment import CheckpointHandler, training
        handler = CheckpointHandler("c")
        loop = training.epochs(3)
        next(loop)
        1 / 0
        """
    )
    assert kernel.reply(request)["ename"] == "ZeroDivisionError"
    os.kill(kernel.pid, signal.SIGTERM)
    assert kernel.has_ended()


@pytest.mark.faults
def test_a_bare_handler_in_a_busy_cell_hears_sigterm_and_sigint_in_every_cell(kernel: Kernel) -> None:
    request = kernel.start("from grd.experiment import CheckpointHandler\nimport time")
    assert kernel.reply(request)["status"] == "ok"
    request = kernel.start("handler = CheckpointHandler('c')")
    assert kernel.reply(request)["status"] == "ok"
    for signum in (signal.SIGTERM, signal.SIGINT):
        request = kernel.start(
            """
            handler = CheckpointHandler("c")
            handler.check_interrupted()
            print("waiting", flush=True)
            while not handler.check_interrupted():
                time.sleep(0.01)
            handler.close()
            """
        )
        kernel.wait_for_output("waiting")
        os.kill(kernel.pid, signum)
        assert kernel.reply(request)["status"] == "ok"


@pytest.mark.faults
def test_a_loop_in_an_async_cell_is_stopped_too(kernel: Kernel) -> None:
    request = kernel.start(
        """
        import asyncio
        from grd.experiment import training
        for epoch in training.epochs(100_000, checkpoint_dir="c"):
            if epoch == 2:
                print("in the loop", flush=True)
            await asyncio.sleep(0.005)
        """
    )
    kernel.wait_for_output("in the loop")
    os.kill(kernel.pid, signal.SIGTERM)
    assert kernel.reply(request)["ename"] == "ExperimentInterrupted"


def test_progress_and_metrics_reach_the_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from grd.experiment import log_metrics, progress

    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("GRD_EVENTS", str(path))
    monkeypatch.setenv("GRD_ATTEMPT", "3")
    for _ in progress(range(10_000), "items"):
        pass
    log_metrics(loss=0.5, bad=float("nan"), epoch=2)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    told = [event for event in events if event["kind"] == "progress"]
    assert len(told) < 20 and (told[-1]["n"], told[-1]["total"], told[-1]["name"]) == (
        10_000,
        10_000,
        "items",
    )
    assert events[-1]["values"] == {"loss": 0.5, "bad": None} and events[-1]["epoch"] == 2
    assert all(event["v"] == 1 and event["attempt"] == 3 and event["pid"] == os.getpid() for event in events)
    with pytest.raises(TypeError, match="name"):
        log_metrics(name="text")


def test_events_that_cannot_be_written_do_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import warnings; warnings.simplefilter('always')\n"
        "from grd.experiment import log_metrics\n"
        "for _ in range(5): log_metrics(loss=1)\nprint('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), "GRD_EVENTS": "/dev/full"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "done"
    assert done.stderr.count("events cannot be written") == 1

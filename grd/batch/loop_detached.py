"""A loop in a process of its own, which outlives whoever started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from grd import contract
from grd.batch.loop import ContinuousResearchLoop
from grd.batch.loop_state import LoopMemory
from grd.errors import ConfigurationError, GrdError, ResourceUnavailable
from grd.execution.launch import start_with_lock

START_SECONDS = 60.0
"""It imports, and reads the plan once more."""

LOOK_SECONDS = 0.1


def start_detached(loop: ContinuousResearchLoop) -> subprocess.Popen[bytes]:
    """Run ``loop``, made from a plan's file, in a process of its own; returns once that has begun.

    The memory is the loop's from the moment on in which this looks whether it is free. Raises
    ResourceUnavailable where another loop has it, or the new process ends before it has begun, and what
    `ContinuousResearchLoop.check` does.
    """
    memory = loop.memory
    loop.check()
    lock = memory.take()
    what = {
        "memory_path": str(memory.path),
        "max_cycles": loop.max_cycles,
        "plan": str(Path(loop.plan_file).expanduser().resolve()),
        "runs_dir": str(loop.runs_dir),
    }
    environment = {k: v for k, v in os.environ.items() if k not in contract.KERNEL_ENVIRONMENT}
    environment["PYTHONUNBUFFERED"] = "1"
    environment[contract.ENV_RUNNER] = memory.path.name  # not a process of a run that it was started from
    command = [sys.executable, "-P", "-m", "grd.batch.loop_detached", json.dumps(what), str(lock)]
    process = start_with_lock(command, lock, memory.process_log, environment, Path.cwd())
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        if _has_begun(memory, process.pid):
            return process
        time.sleep(LOOK_SECONDS)
    if _has_begun(memory, process.pid):
        return process  # and is over already
    raise ResourceUnavailable(f"the loop has not begun{_last_line(memory.process_log)}")


def _has_begun(memory: LoopMemory, pid: int) -> bool:
    with contextlib.suppress(ConfigurationError):
        return bool((memory.read().get("loop") or {}).get("pid") == pid)
    return False


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), None)
        return f"; see {log}" if said is None else f": {said.strip()}; see {log}"
    return ""


def main(arguments: list[str]) -> int:
    """Run one loop to its end; how it ended stands in its memory."""
    what: dict[str, Any] = json.loads(arguments[0])
    lock = int(arguments[1])
    os.set_inheritable(lock, False)  # ours alone: a run must not keep it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ContinuousResearchLoop(
            what["memory_path"], what["max_cycles"], plan=what["plan"], runs_dir=what["runs_dir"]
        ).run(lock=lock)
    except GrdError as error:
        print(f"grd: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

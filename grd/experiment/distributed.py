"""Training on several devices from one cell: torchrun as a child of the kernel, and what its workers need.

In the notebook: ``distributed.launch("train_ddp.py", "--epochs", "20")``, or a function of a module. In the
workers, `process_group` gives a `Group`, whose answers and saves are the same on every rank: one that stopped
a step before the others would leave them waiting for it for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from grd import contract
from grd.errors import CheckpointError, ExperimentInterrupted, ResourceUnavailable, UsageError
from grd.experiment import interruption
from grd.experiment.checkpoint_handler import CheckpointHandler
from grd.experiment.exchange import exchange_folder
from grd.experiment.stopped import stopped

ENV_STOPPED = "GRD_DISTRIBUTED_STOPPED"
"""Path of a file that rank 0 writes once all ranks have honoured a stop."""

LOOK_SECONDS = 0.1
END_SECONDS = 10.0
"""What torchrun and its workers have between SIGTERM and SIGKILL where the cell was interrupted."""


def launch(
    target: str | Path | Callable[..., Any],
    *arguments: Any,
    nprocs: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``target`` in ``nprocs`` processes of one machine, under torchrun, and wait for them.

    ``target``: a script, whose ``arguments`` are its command line; or a function of a module, or its name
    as "module:function", called with ``arguments``, which must be JSON values. ``nprocs``: by default one for
    each GPU that was leased for the run, at least one. ``environment`` has variables besides this process's.
    What the workers print, this cell prints. A stop request is handed on to them, and raises
    ExperimentInterrupted here once they have honoured it; whatever else ends this call ends them.

    Raises UsageError for a target that workers cannot find (a function of the notebook itself: put it into a
    file), ResourceUnavailable without torch, RuntimeError if a worker failed; torch prints which and why.
    """
    what = _command(target, arguments)
    workers = _workers(nprocs)
    with exchange_folder() as folder, interruption.armed():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(workers), "--log-dir", str(folder / "log"), *what]
        stop_file, honoured = folder / "stop", folder / "stopped"
        variables = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
            # Theirs and not the run's: a stop that came as a signal reaches them by it too.
            contract.ENV_STOP_FILE: str(stop_file),
            ENV_STOPPED: str(honoured),
        }
        # torchrun sets one thread a worker, and a warning, where nobody has chosen.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // workers)
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        returncode, reason = _follow(command, variables, stop_file)
        if honoured.exists():
            interruption.honoured()
            told = json.loads(honoured.read_text(encoding="utf-8"))
            raise ExperimentInterrupted(told["message"], reason=reason or told["reason"])
    if returncode != 0:
        raise RuntimeError(
            f"a worker failed, and torchrun ended with exit code {returncode}: see what was printed above"
        )


def _workers(nprocs: int | None) -> int:
    if nprocs is None:
        leased = os.environ.get(contract.ENV_GPUS)
        return len(leased.split(",")) if leased else 1
    if isinstance(nprocs, bool) or not isinstance(nprocs, int) or nprocs < 1:
        raise UsageError(f"launch(nprocs={nprocs!r}): write a whole number from 1 on")
    return nprocs


def _command(target: str | Path | Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """What torchrun is to run."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ResourceUnavailable("distributed.launch needs torch: pip install 'grd-notebooks[torch]'")
    if callable(target):
        module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
        if module in (None, "__main__") or "<" in name:
            raise UsageError(
                f"{name or target!r} is a function of this notebook, which other processes cannot import: "
                "write it into a file (%%writefile train_ddp.py), and launch that"
            )
        target = f"{module}:{name}"
    text = str(target)
    if Path(text).suffix == ".py":
        if not Path(text).is_file():
            raise UsageError(f"launch: there is no script {text} in {Path.cwd()}")
        return [text, *map(str, arguments)]
    module, colon, name = text.partition(":")
    if not colon or find_spec(module.split(".")[0]) is None:
        raise UsageError(f"launch: {text!r} is no script (NAME.py) and no function (MODULE:FUNCTION)")
    try:
        values = json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"launch: the arguments of {text} must be JSON values: {error}") from None
    return ["-m", "grd.experiment.distributed_worker", text, values]


# --- in the kernel ---------------------------------------------------------------------------------------


def _follow(command: list[str], environment: dict[str, str], stop_file: Path) -> tuple[int, str | None]:
    """Print what they print until they end; exit code, and why they were asked to stop."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the kernel alone, which hands it on as a stop
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    asked: str | None = None
    try:
        while True:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=LOOK_SECONDS)
                if line is None:
                    return process.wait(timeout=END_SECONDS), asked
                print(line, end="", flush=True)
            reason = interruption.stop_requested()
            if reason is not None and asked is None:
                asked = reason
                stop_file.write_text(json.dumps({"reason": reason}), encoding="utf-8")
    except subprocess.TimeoutExpired:
        raise RuntimeError("torchrun closed its output and went on: it was ended") from None
    finally:
        _end(process)
        process.stdout.close()


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing of it stays: torchrun ends its workers on SIGTERM; the rest is killed, whatever its session."""
    if process.poll() is not None:
        return
    import psutil

    tree = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.Error):
        tree += tree[0].children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=END_SECONDS)
    for each in tree:
        with contextlib.suppress(psutil.Error):
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=END_SECONDS)


# --- in the workers --------------------------------------------------------------------------------------


class Group:
    """One worker among the others. Every method is to be called by all of them, in the same order."""

    def __init__(self, rank: int, world_size: int, local_rank: int, device: Any) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = device
        """torch.device of this worker: its GPU, or the CPU."""
        self._checkpoints: Checkpoints | None = None

    def stop_requested(self) -> str | None:
        """Why to stop now, the same on all ranks as soon as any of them was asked; None otherwise.

        Costs one all-reduce of a number: ask at each step, or at each few of them.
        """
        import torch

        causes = list(contract.CAUSES)
        reason = interruption.stop_requested()
        number = 0 if reason is None else 1 + causes.index(reason if reason in causes else contract.STOPPED)
        flag = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        heard = int(flag.item())
        return causes[heard - 1] if heard else None

    def stop_if_asked(self, where: str) -> None:
        """Raise ExperimentInterrupted on all ranks if any was asked to stop; save before."""
        reason = self.stop_requested()
        if reason is not None:
            kept = self._checkpoints
            raise stopped(
                where, reason, saves=kept is not None, saved=kept is not None and kept.saved, failure=None
            )

    def checkpoints(self, checkpoint_dir: Path | str, *, resume: bool = False, **options: Any) -> Checkpoints:
        """The run's checkpoint folder for all ranks; ``options`` are `CheckpointHandler`'s."""
        self._checkpoints = Checkpoints(self, checkpoint_dir, resume, options)
        return self._checkpoints

    def barrier(self) -> None:
        """Until all ranks are here."""
        import torch

        torch.distributed.all_reduce(torch.zeros(1, device=self.device))

    def agree(self, value: Any) -> list[Any]:
        """What each rank says, by rank; a small value that can be pickled."""
        import torch

        said: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(said, value)
        return said


class Checkpoints:
    """Checkpoints of a group: rank 0 writes them, all ranks read them."""

    def __init__(self, group: Group, folder: Path | str, resume: bool, options: dict[str, Any]) -> None:
        self._group = group
        self.saved = False
        options = {"install_signal_handlers": False, **options}
        if group.rank == 0:
            self.handler = CheckpointHandler(folder, resume=resume, **options)
            if not resume:
                self.handler.begin_lineage()
        group.barrier()
        if group.rank != 0:
            self.handler = CheckpointHandler(folder, resume=True, **options)
        self._resume = resume

    def load(self, model: Any = None, optimizer: Any = None, **options: Any) -> dict[str, Any] | None:
        """`CheckpointHandler.load_checkpoint` on each rank; None where this is a fresh start.

        Raises CheckpointError unless all ranks have read the same.
        """
        if not self._resume:
            return None
        options.setdefault("map_location", self._group.device)
        content = self.handler.load_checkpoint(model, optimizer, **options)
        position = None if content is None else (content["epoch"], content.get("step"))
        if any(other != position for other in self._group.agree(position)):
            raise CheckpointError(f"the ranks read different checkpoints of {self.handler.checkpoint_dir}")
        return content

    def save(self, epoch: int, **state: Any) -> None:
        """`CheckpointHandler.save_checkpoint` by rank 0; the others wait until it is written.

        For a model in DistributedDataParallel give ``model=net.module``: then the file fits one process too.
        If it cannot be written CheckpointError is raised on all ranks.
        """
        failure: CheckpointError | None = None
        with interruption.saving():
            if self._group.rank == 0:
                try:
                    self.handler.save_checkpoint(epoch, async_save=False, **state)
                except CheckpointError as error:
                    failure = error
            told = self._group.agree(None if failure is None else str(failure))[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise CheckpointError(told)
        self.saved = True


@contextlib.contextmanager
def process_group(backend: str | None = None) -> Iterator[Group]:
    """The group of this worker, for the length of a ``with``: torch's process group is made and destroyed.

    ``backend``: by default nccl where there are GPUs, else gloo. Without torchrun it is a group of one. At a
    stop that was honoured the worker ends with exit code 0, and `launch` raises for it.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if "RANK" not in os.environ:
            options = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(backend or ("nccl" if on_gpu else "gloo"), **options)
        stack.callback(_leave)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        stack.enter_context(interruption.armed())
        group = Group(rank, world_size, local_rank, device)
        try:
            yield group
        except ExperimentInterrupted as end:
            interruption.honoured()
            path = os.environ.get(ENV_STOPPED)
            if path is None:
                raise
            if rank == 0:
                told = json.dumps({"message": str(end), "reason": end.reason})
                Path(path).write_text(told, encoding="utf-8")
            sys.exit(0)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

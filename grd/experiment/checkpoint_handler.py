"""Saving and loading training state so that nothing bad is ever loaded, whatever kills the process."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import CheckpointCorrupt, CheckpointError, CheckpointFenced, CheckpointRefused
from grd.experiment import checkpoint_file, checkpoint_folder, interruption, saving_history
from grd.experiment.checkpoint_folder import Found, version_name
from grd.experiment.events import attempt_number, emit, run_id
from grd.experiment.manifest import Entry, append_entry, process_id, read_entries, read_manifest
from grd.experiment.reporting import as_number
from grd.experiment.state_encoding import as_json
from grd.files import fsync_folder
from grd.settings import Settings, parse_size

FORMAT = "grd.checkpoint/1"

_lock = threading.RLock()
_lineages: dict[str, int] = {}
_known_good: dict[str, set[str]] = {}
_work_began: dict[str, float] = {}


class CheckpointHandler:
    """Writes and reads the checkpoints of one folder.

    ``epoch`` counts from 0. ``total_epochs`` is for the hints. ``keep_bytes`` bounds the versions kept
    (default GRD_CHECKPOINT_BUDGET, else 20 GB; never fewer than two good ones). ``resume=False`` moves the
    files of earlier attempts aside; otherwise what is there is continued. With ``install_signal_handlers``
    SIGTERM and SIGINT set ``interrupted`` (main thread only) until `close` or the handler's end.

    Without torch the files keep their names and hold JSON and raw arrays. Raises OSError if the folder
    cannot be made.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str,
        *,
        total_epochs: int | None = None,
        keep_bytes: int | str | None = None,
        install_signal_handlers: bool = True,
        resume: bool | None = None,
        report_events: bool = True,
    ) -> None:
        self.report_events = report_events
        self.checkpoint_dir = Path(checkpoint_dir)
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self.total_epochs = total_epochs
        self.keep_bytes = budget_of(keep_bytes)
        self.interrupted = False
        self._key = os.path.realpath(self.checkpoint_dir)
        _work_began.setdefault(self._key, time.monotonic())
        checkpoint_folder.sweep(self.checkpoint_dir)
        if resume is False:
            check_fence(self.checkpoint_dir)
            with _lock:
                checkpoint_folder.move_aside(
                    self.checkpoint_dir, lambda version: not version.is_ours, reason="a fresh start"
                )
        if install_signal_handlers:
            interruption.watch(self)

    # --- writing ---

    def save_checkpoint(
        self,
        epoch: int,
        model_state: Any = None,
        optimizer_state: Any = None,
        loss: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        optimizer: Any = None,
        step: int | None = None,
        state: Any = None,
        allow_pickle: bool = False,
        **more: Any,
    ) -> Path:
        """Save the state after ``epoch``, or after ``step`` steps inside it; returns the file's path.

        Model and optimizer are objects with ``state_dict()`` or their states. ``metadata`` becomes JSON
        data. Whatever else is to come back goes by name. Raises CheckpointRefused for what could not be
        loaded without running code, CheckpointFenced if a newer attempt owns the folder, CheckpointError if
        it cannot be written; then the versions before are as they were.
        """
        clash = sorted(set(more) & {"format"})
        if clash:
            raise CheckpointRefused(f"{clash[0]!r} is a name the checkpoint needs itself: choose another")
        epoch = int(epoch)
        step = None if step is None else int(step)
        facts = as_json(metadata or {})
        loss_value = None if loss is None else _plain_loss(loss)
        total = self.total_epochs if self.total_epochs is not None else facts.get("total_epochs")
        # From the first look at the state to the event: none of it may be cut by a signal.
        with interruption.saving():
            payload = {
                "format": FORMAT,
                "epoch": epoch if step is None else epoch - 1,
                "model_state": _state_of(model if model is not None else model_state),
                "optimizer_state": _state_of(optimizer if optimizer is not None else optimizer_state),
                "loss": loss_value,
                "metadata": facts,
                **({} if step is None else {"step": step}),
                **({} if state is None else {"state": state}),
                **more,
            }
            started = time.monotonic()
            with _lock:
                path, size = self._write(version_name(epoch, step), payload, epoch, step, total, allow_pickle)
                self.begin_work()
            if self.report_events:
                emit(
                    contract.EVENT_CHECKPOINT,
                    epoch=payload["epoch"],
                    step=step,
                    path=str(path.absolute()),
                    bytes=size,
                    seconds=round(time.monotonic() - started, 6),
                )
        return path

    def _write(
        self,
        name: str,
        payload: dict[str, Any],
        epoch: int,
        step: int | None,
        total: Any,
        allow_pickle: bool,
    ) -> tuple[Path, int]:
        path = self.checkpoint_dir / name
        lineage = self._lineage(epoch, step)
        started = time.monotonic()
        try:
            with checkpoint_folder.temporary_name(self.checkpoint_dir, name) as temporary:
                written = checkpoint_file.write(temporary, payload, allow_pickle=allow_pickle)
                check_fence(self.checkpoint_dir)
                # The entry comes before the rename: a crash between them leaves the old file, which matches
                # its own older entry, and never a file of ours that nobody vouches for.
                append_entry(
                    self.checkpoint_dir,
                    Entry(
                        name=name,
                        size=written.size,
                        xxh3_128=written.xxh3_128,
                        epoch=payload["epoch"],
                        step=step,
                        loss=None if payload["loss"] is None else as_number(payload["loss"]),
                        lineage=lineage,
                        attempt=attempt_number(),
                        run_id=run_id(),
                        process=process_id(),
                        format=written.format,
                        total_epochs=total if isinstance(total, int) else None,
                        t=time.time(),
                        seconds=round(time.monotonic() - started, 6),
                        work_seconds=round(started - _work_began[self._key], 6),
                        stop=interruption.stop_requested(),
                    ),
                )
                check_fence(self.checkpoint_dir)
                temporary.replace(path)
                fsync_folder(self.checkpoint_dir)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be saved: {error.strerror or error}; the versions before it are untouched"
            ) from error
        good = _known_good.setdefault(self._key, set())
        good.add(name)
        present = checkpoint_folder.versions(self.checkpoint_dir)
        checkpoint_folder.point_latest(checkpoint_folder.newest_good(present, good) or path)
        checkpoint_folder.prune(present, self.keep_bytes, good)
        return path, written.size

    def _lineage(self, epoch: int, step: int | None) -> int:
        if self._key in _lineages:
            return _lineages[self._key]
        present = checkpoint_folder.versions(self.checkpoint_dir)
        ours = [version.lineage for version in present if version.is_ours]
        position = (epoch, math.inf if step is None else step)
        if ours:
            lineage = max(ours)
        elif present and present[0].position < position:
            lineage = max(1, present[0].lineage)
        else:
            # Nothing there, or somebody's later epochs, which must not win over the ones that come now.
            lineage = self._next_lineage()
        _lineages[self._key] = lineage
        return lineage

    def _next_lineage(self) -> int:
        manifest = read_manifest(self.checkpoint_dir).values()
        return max((entry.lineage for entries in manifest for entry in entries), default=0) + 1

    def begin_lineage(self) -> None:
        """Let what is saved from now on win over everything in the folder, whatever its epoch."""
        with _lock:
            _lineages[self._key] = self._next_lineage()

    def begin_work(self) -> None:
        """Count what the next save makes safe from here: a training begins, or was just saved."""
        _work_began[self._key] = time.monotonic()

    # --- reading ---

    def _scan(self, *, epoch: int | None = None, passed_over: set[Path] | None = None) -> Found | None:
        result = checkpoint_folder.scan(self.checkpoint_dir, epoch=epoch, passed_over=passed_over or ())
        used = result.found.path.name if result.found is not None else "none, there is no other good one"
        for path, reason in result.damaged:
            message = f"checkpoint {path} is damaged: {reason}; used instead: {used}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            emit(contract.EVENT_WARNING, message=message)
        if epoch is not None and result.found is None and result.damaged:
            path, reason = result.damaged[0]
            raise CheckpointCorrupt(
                f"{path} is damaged: {reason}; load another epoch, or the newest good one"
            )
        return result.found

    def load_checkpoint(
        self,
        model: Any = None,
        optimizer: Any = None,
        *,
        epoch: int | None = None,
        map_location: Any = None,
        allow_pickle: bool = False,
    ) -> dict[str, Any] | None:
        """The newest good checkpoint, or that of a completed ``epoch``; None if there is none.

        The dictionary has epoch (the last completed one), model_state, optimizer_state, loss, metadata and
        what else was saved; ``model`` and ``optimizer`` get their states by ``load_state_dict``. Damaged
        files are named in a warning and passed over. ``allow_pickle`` is for objects saved with it, and
        only in files of the folder's own manifest.

        Raises CheckpointRefused for a file that needs code, CheckpointCorrupt for a damaged ``epoch``,
        CheckpointError for a sound file that cannot be opened here.
        """
        passed_over: set[Path] = set()
        while True:
            found = self._scan(epoch=epoch, passed_over=passed_over)
            if found is None:
                return None
            try:
                content = checkpoint_file.read(
                    found.path,
                    map_location=map_location,
                    allow_pickle=allow_pickle and found.entry is not None,
                )
            except CheckpointError:
                raise
            except Exception as error:
                if found.entry is not None:
                    raise CheckpointError(
                        f"{found.path} is sound but cannot be opened here: {error}"
                    ) from error
                warnings.warn(
                    f"{found.path} is no checkpoint of ours and cannot be opened: {error}; it is passed over",
                    RuntimeWarning,
                    stacklevel=2,
                )
                passed_over.add(found.path)
                continue
            return _restore(content, found, model, optimizer)

    def find_latest_checkpoint(self) -> Path | None:
        """Path of the newest good checkpoint, or None."""
        found = self._scan()
        return None if found is None else found.path

    def get_resumability_hints(self) -> dict[str, Any]:
        """Whether and where a resume would go on; never loads the state.

        Keys: has_checkpoint, valid, latest_epoch (last completed), step (inside the next, or None),
        next_epoch, checkpoint_path, estimated_remaining_epochs (None if the total is unknown),
        expected_lost_seconds (training that a kill without warning loses on average) and expected_overhead
        (saving as a share of the training), both as measured and None before the second save, and
        resume_command (what to type to go on; None if there is nothing to go on from or with).
        """
        found = self._scan()
        total = self.total_epochs
        latest: int | None = None
        if found is not None:
            latest = found.epoch
            if latest is None:  # a lone checkpoint_latest.pt from elsewhere
                content = self.load_checkpoint()
                latest = None if content is None else int(content["epoch"])
            if total is None and found.entry is not None:
                total = found.entry.total_epochs
        next_epoch = 0 if latest is None else latest + 1
        remaining = None if total is None else max(0, total - next_epoch)
        entries = read_entries(self.checkpoint_dir)
        return {
            "has_checkpoint": found is not None,
            "valid": found is not None,
            "latest_epoch": latest,
            "step": None if found is None else found.step,
            "next_epoch": next_epoch,
            "checkpoint_path": None if found is None else found.path,
            "estimated_remaining_epochs": remaining,
            "expected_lost_seconds": saving_history.expected_lost_seconds(entries),
            "expected_overhead": saving_history.expected_overhead(entries),
            "resume_command": None if found is None or remaining == 0 else self._resume_command(found),
        }

    def _resume_command(self, found: Found) -> str:
        run = run_id() or (found.entry.run_id if found.entry is not None else None)
        if run is not None:
            return f"grd resume {run}"
        return f"CheckpointHandler({str(self.checkpoint_dir)!r}).load_checkpoint()"

    def seconds_between_interruptions(self) -> float | None:
        """Mean training time between ends without warning, as the folder tells; None while there was none."""
        return saving_history.seconds_between_interruptions(read_entries(self.checkpoint_dir))

    # --- stopping ---

    def check_interrupted(self) -> bool:
        """Whether a signal came or the runner asked to stop; cheap enough for every step."""
        interruption.rearm()
        if not self.interrupted and interruption.stop_requested() is not None:
            self.interrupted = True
        return self.interrupted

    def close(self) -> None:
        """Give the signals back; closing twice is harmless."""
        interruption.unwatch(self)


def budget_of(keep_bytes: int | str | None) -> int:
    """Bytes that versions may take: as asked for, as the run was told, or the default. Raises ValueError."""
    if keep_bytes is not None:
        return parse_size(keep_bytes)
    try:
        return parse_size(os.environ["GRD_CHECKPOINT_BUDGET"])
    except (KeyError, ValueError):
        return Settings().checkpoint_budget


def _state_of(value: Any) -> Any:
    if value is None or isinstance(value, (dict, list, tuple)):
        return value
    return value.state_dict() if hasattr(value, "state_dict") else value


def _plain_loss(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointRefused(f"loss must be one number, not {type(loss).__name__}") from None


def check_fence(folder: Path) -> None:
    """Raise CheckpointFenced if GRD_FENCE names a newer attempt than ours."""
    fence = os.environ.get(contract.ENV_FENCE)
    if not fence:
        return
    try:
        newest = int(Path(fence).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return
    if newest > attempt_number():
        raise CheckpointFenced(
            f"attempt {newest} of this run owns {folder}; attempt {attempt_number()} wrote nothing"
        )


def _restore(content: dict[str, Any], found: Found, model: Any, optimizer: Any) -> dict[str, Any]:
    content.pop("format", None)
    for name in ("model_state", "optimizer_state"):
        other = content.pop(f"{name}_dict", None)
        if content.get(name) is None:
            content[name] = other
    content.setdefault("loss", None)
    content.setdefault("metadata", {})
    if content.get("epoch") is None:
        content["epoch"] = -1 if found.epoch is None else found.epoch
    for target, name in ((model, "model_state"), (optimizer, "optimizer_state")):
        if target is None:
            continue
        if content[name] is None:
            raise CheckpointError(f"{found.path} holds no {name}: save it with the checkpoint")
        target.load_state_dict(content[name])
    return content

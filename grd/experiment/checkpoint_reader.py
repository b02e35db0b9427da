"""Reading the newest good checkpoint of a folder: what is damaged or strange is told and passed over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import CheckpointCorrupt, CheckpointError
from grd.experiment import checkpoint_file, checkpoint_folder
from grd.experiment.checkpoint_folder import Found, Scan
from grd.experiment.events import emit
from grd.experiment.manifest import MANIFEST_NAME


class CheckpointReader:
    """Reads one folder; each doubt about a file of it is told once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: set[str] = set()

    def _scan(self, *, epoch: int | None = None, passed_over: set[Path] | None = None) -> Found | None:
        result = checkpoint_folder.scan(self.folder, epoch=epoch, passed_over=passed_over or ())
        self._tell_of_doubts(result)
        used = result.found.path.name if result.found is not None else "none, there is no other good one"
        for path, reason in result.damaged:
            message = f"checkpoint {path} is damaged: {reason}; used instead: {used}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            emit(contract.EVENT_WARNING, message=message)
        if epoch is not None and result.found is None and result.damaged:
            path, reason = result.damaged[0]
            raise CheckpointCorrupt(
                f"{path} is damaged: {reason}; load another epoch, or the newest good one"
            )
        return result.found

    def _tell_of_doubts(self, result: Scan) -> None:
        manifest = self.folder / MANIFEST_NAME
        for number in result.damaged_lines:
            self._doubt(
                f"line {number} of {manifest} is damaged; files that it may have vouched for are checked by "
                "their own checksums"
            )
        for path in result.strangers:
            self._doubt(f"{path} looks newer, but is not of this folder's manifest: it is passed over")

    def _doubt(self, message: str, stacklevel: int = 6) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=stacklevel)
            emit(contract.EVENT_WARNING, message=message)

    def newest(
        self,
        *,
        epoch: int | None = None,
        map_location: Any = None,
        allow_pickle: bool = False,
        read_ours: bool = False,
    ) -> tuple[Found, dict[str, Any] | None] | None:
        """The newest version that can be loaded, and what is in it; of ours only if ``read_ours``.

        A file that is not of the manifest may be a sound zip and no checkpoint: only opening it tells.
        """
        passed_over: set[Path] = set()
        while True:
            found = self._scan(epoch=epoch, passed_over=passed_over)
            if found is None:
                return None
            is_ours = found.entry is not None
            if is_ours and not read_ours:
                return found, None
            try:
                content = checkpoint_file.read(
                    found.path, map_location=map_location, allow_pickle=allow_pickle and is_ours
                )
                if not is_ours and found.version is None:
                    epoch_of(content, found)
                return found, content
            except CheckpointError as error:
                # One of ours whose line is damaged may hold pickles, which nobody vouches for any more.
                unlisted = found.version is not None and found.version.may_be_unlisted and not is_ours
                if not (unlisted and allow_pickle):
                    raise
                reason = str(error)
            except Exception as error:
                if is_ours:
                    raise CheckpointError(
                        f"{found.path} is sound but cannot be opened here: {error}"
                    ) from error
                reason = f"{found.path} is no checkpoint of ours and cannot be opened: {error}"
            self._doubt(f"{reason}; it is passed over", stacklevel=4)
            passed_over.add(found.path)


def epoch_of(content: Mapping[str, Any], found: Found) -> int:
    """The last completed epoch: as the file says, or its name. Raises ValueError if neither does."""
    try:
        said = content.get("epoch")
        if said is not None:
            return int(said)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        if found.epoch is None:
            raise ValueError(f"its epoch is {said!r}, which is no number") from None
    return -1 if found.epoch is None else found.epoch


def restore(content: dict[str, Any], found: Found, model: Any, optimizer: Any) -> dict[str, Any]:
    """``content`` as `CheckpointHandler.load_checkpoint` gives it; ``model`` and ``optimizer`` get theirs."""
    if str(content.pop("format", "")).startswith("grd."):
        content.pop("lineage", None)
    for name in ("model_state", "optimizer_state"):
        other = content.pop(f"{name}_dict", None)
        if content.get(name) is None:
            content[name] = other
    content.setdefault("loss", None)
    content.setdefault("metadata", {})
    if found.entry is None or content.get("epoch") is None:
        content["epoch"] = epoch_of(content, found)
    for target, name in ((model, "model_state"), (optimizer, "optimizer_state")):
        if target is None:
            continue
        if content[name] is None:
            raise CheckpointError(f"{found.path} holds no {name}: save it with the checkpoint")
        target.load_state_dict(content[name])
    return content

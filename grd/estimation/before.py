"""How long a run will take, before anything of it is started: by earlier runs of the same notebook."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.errors import ResourceUnavailable
from grd.estimation import history
from grd.estimation.estimate import UNKNOWN, Estimate, confidence_of
from grd.estimation.history import Job, Likeness, PastRun
from grd.estimation.interval import PRIOR_HISTORY, PRIOR_PROBE, PRIOR_SIMILAR, Factor, factor_of
from grd.files import read_json
from grd.runs.folder import RunFolder, run_folders

RUNS_READ = 1000
"""The newest ones; their run.json alone is read, and of the few that are used, hardware.json."""

KERNEL_SECONDS = 0.2
"""No kernel is up sooner; measured starts take twice as long and more."""

UNKNOWN_SPEED = 1.5
"""How much wider the assumed interval is where then and now cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Before:
    """An estimate before the start, with what run.json keeps so that later ones can learn from it."""

    estimate: Estimate
    live: Factor
    """The factor for the time left while it runs."""
    code_sha256: str
    speed: float | None
    """MB/s of `grd.estimation.speed` at the start."""

    def to_record(self) -> dict[str, Any]:
        """The field ``estimate`` of run.json."""
        return {
            **self.estimate.to_dict(),
            "code_sha256": self.code_sha256,
            "speed_mbs": self.speed,
            "live_factor": round(self.live.value, 4),
            "live_runs": self.live.n,
            "probe": None,
        }


def code_sha256(notebook: Mapping[str, Any]) -> str:
    """sha256 (hexadecimal) over the sources of the code cells in order; outputs and metadata are left out."""
    digest = hashlib.sha256()
    for cell in notebook["cells"]:
        if cell.get("cell_type") == "code":
            source = cell.get("source", "")
            text = source if isinstance(source, str) else "".join(source)
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def read_past(runs_dir: Path, limit: int = RUNS_READ) -> list[PastRun]:
    """The newest ``limit`` runs in ``runs_dir``, newest first; damaged records are passed over.

    A folder that cannot be read has none, as far as anybody can tell.
    """
    found = []
    folders: list[RunFolder] = []
    with contextlib.suppress(ResourceUnavailable):
        folders = list(itertools.islice(run_folders(runs_dir), limit))
    for folder in folders:
        try:
            record = read_json(folder.record)
        except (OSError, ValueError):
            continue
        run = PastRun.of(record) if isinstance(record, dict) else None
        if run is not None:
            found.append(run)
    return found


def estimate_before(
    job: Job,
    runs_dir: Path,
    *,
    speed: float | None = None,
    profile: Callable[[], Mapping[str, Any]] | None = None,
    past: Sequence[PastRun] | None = None,
) -> Before:
    """The estimate of ``job`` by the runs in ``runs_dir``. Starts and writes nothing, and never raises.

    ``past`` is what `read_past` has found there, where the caller estimates many jobs.

    ``speed`` is `machine_speed` now. ``profile`` gives the hardware profile of this machine; it is asked
    only if there are runs to compare with, for that takes a tenth of a second.
    """
    if past is None:
        past = read_past(runs_dir)
    alike = history.most_alike(job, past)
    fingerprint, machines = None, {}
    if alike and profile is not None:
        fingerprint = profile().get("fingerprint")
        machines = {like.run.run_id: _machine(RunFolder(runs_dir / like.run.run_id)) for like in alike}
    return Before(
        estimate=decide(job, past, alike, speed=speed, fingerprint=fingerprint, machines=machines),
        live=factor_of(history.probe_predictions(past), PRIOR_PROBE),
        code_sha256=job.code_sha256,
        speed=speed,
    )


def decide(
    job: Job,
    past: Sequence[PastRun],
    alike: Sequence[Likeness],
    *,
    speed: float | None,
    fingerprint: str | None,
    machines: Mapping[str, tuple[str | None, bool]],
) -> Estimate:
    """The estimate by the runs ``alike``; ``machines`` has fingerprint and "has a GPU" by run id. Pure."""
    if not alike:
        return unknown(history.lower_bound(job, past))
    without, with_speed, compared = [], [], 0
    for like in alike:
        seconds = like.scaled() or 0.0
        has_gpu = machines.get(like.run.run_id, (None, False))[1]
        ratio = None if has_gpu else history.speed_ratio(like.run.estimate.get("speed_mbs"), speed)
        compared += ratio is not None
        without.append(seconds)
        with_speed.append(seconds * (1.0 if ratio is None else ratio))
    plain, seconds = statistics.median(without), statistics.median(with_speed)
    remarks = _differences(alike, fingerprint, machines)
    method = "similar" if remarks else "history"
    prior = PRIOR_SIMILAR if remarks else PRIOR_HISTORY
    factor = factor_of(history.predictions(past, method), prior if compared else prior * UNKNOWN_SPEED)
    low = max(factor.around(min(plain, seconds))[0], min(KERNEL_SECONDS, seconds))
    high = factor.around(max(plain, seconds))[1]
    if not math.isfinite(high):
        return unknown(history.lower_bound(job, past), beyond=True)
    return Estimate(
        seconds=seconds,
        low=min(low, seconds),
        high=high,
        method=method,
        basis=_basis(alike, remarks, compared, seconds / plain if plain else 1.0, factor),
        confidence=confidence_of(factor),
        n_runs=len(alike),
    )


def unknown(seconds: float, *, beyond: bool = False) -> Estimate:
    """Nothing tells how long it takes; it has gone on for ``seconds`` before without coming to its end.

    ``beyond``: by earlier runs it would take longer than a number can say.
    """
    if beyond:
        basis = (
            "by the size of earlier runs it would take longer than can be reckoned; look at the parameters"
        )
    elif seconds > 0:
        basis = "no run of this notebook has come to its end, and none told its progress; one was stopped"
    else:
        basis = (
            "no run of this notebook has come to its end here; the run itself says more after its first steps"
        )
    return Estimate(
        seconds=None, low=seconds or KERNEL_SECONDS, high=None, method="unknown", basis=basis,
        confidence=UNKNOWN,
    )  # fmt: skip


def _machine(folder: RunFolder) -> tuple[str | None, bool]:
    """Fingerprint of what a run ran on, and whether that has a GPU."""
    try:
        profile = read_json(folder.hardware)
        return profile.get("fingerprint"), bool(profile.get("gpus"))
    except (OSError, ValueError, AttributeError):
        return None, False


def _differences(
    alike: Sequence[Likeness], fingerprint: str | None, machines: Mapping[str, tuple[str | None, bool]]
) -> list[str]:
    best = alike[0]
    remarks = []
    if best.other_version:
        remarks.append("of another version of the notebook")
    if best.other_parameters:
        remarks.append(f"with other {', '.join(best.other_parameters)}")
    if len(best.sizes) > 1:
        remarks.append("of a size that differs in more than one parameter")
    if best.sizes and best.run.loop_seconds() is None:
        remarks.append("whose progress does not tell the loop from the rest")
    known = {machines[like.run.run_id][0] for like in alike if like.run.run_id in machines} - {None}
    if fingerprint is not None and known and known != {fingerprint}:
        remarks.append("on another machine, or with another torch")
    return remarks


def _basis(
    alike: Sequence[Likeness], remarks: Sequence[str], compared: int, slower: float, factor: Factor
) -> str:
    best, n = alike[0], len(alike)
    kind = "completed" if best.run.total_seconds() == best.run.seconds else "interrupted"
    parts = [f"{n} {kind} run{'s' if n > 1 else ''} of this notebook"]
    parts += remarks
    parts += [f"scaled from {name} {then:g} to {now:g}" for name, (then, now) in best.sizes.items()]
    if not compared:
        parts.append("the machine's speed then and now was not compared")
    elif abs(slower - 1) >= 0.05:
        parts.append(f"times {slower:.2g} since the machine is {'slower' if slower > 1 else 'faster'} now")
    return f"{', '.join(parts)}; {factor.how}"

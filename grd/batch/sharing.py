"""How many runs at once, and what each may take of this machine: never more than it has. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "NUMEXPR_MAX_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS", "LOKY_MAX_CPU_COUNT",
)  # fmt: skip
"""What numpy, torch, scikit-learn, polars and their libraries read at their import."""

LEAST_MEMORY_BYTES = 256 * 1024**2
"""Runner, guardian and a kernel that has imported something; nothing is known of a first run but that."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Runs at once, and the threads that each may use."""

    jobs: int
    threads: int
    bound_by: str | None = None
    """What keeps it below the jobs that were wanted, for people; None where nothing does."""


def share(
    *, wanted: int | None, runs: int, cores: int | None, memory: int | None, needed: int | None
) -> Share:
    """Divide a machine with ``cores`` and ``memory`` bytes to give among runs that need ``needed`` each.

    Without ``wanted`` there are as many jobs as cores. None is unknown and bounds nothing.
    """
    bounds = [(runs, "")]
    if cores is not None:
        bounds.append((cores, f"{cores} usable core{'s' if cores > 1 else ''}"))
    if memory is not None and needed:
        fit = max(1, memory // needed)
        bounds.append((fit, f"{memory / 1e9:.3g} GB of memory at {needed / 1e9:.3g} GB a run"))
    if wanted is not None:
        bounds.append((wanted, ""))
    elif cores is None:
        bounds.append((1, "an unknown number of cores"))
    jobs, why = min(bounds, key=lambda bound: bound[0])
    jobs = max(1, jobs)
    limited = wanted is not None and jobs < min(wanted, runs)
    threads = 1 if cores is None else max(1, cores // jobs)
    return Share(jobs=jobs, threads=threads, bound_by=why if limited else None)


def thread_environment(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep a run's libraries to ``threads``; smaller numbers that somebody set stay."""
    found = {}
    for name in THREAD_VARIABLES:
        given = environment.get(name, "").strip()
        typed = int(given) if given.isdecimal() and int(given) > 0 else threads
        found[name] = str(min(typed, threads))
    return found


def has_room(*, available: int, needed: int, in_use: Sequence[int]) -> bool:
    """Whether one more run fits into ``available`` bytes, when those under way grow to what a run needs.

    ``in_use`` has what each of them takes now. The first one always may.
    """
    if not in_use:
        return True
    still_to_come = sum(max(0, needed - now) for now in in_use)
    return available - still_to_come >= needed

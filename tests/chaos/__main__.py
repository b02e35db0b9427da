"""``python -m tests.chaos``: kill runs, fill their disks, at random moments; exit 1 if a promise breaks."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # conftest, as for the tests

from .campaign import Tally, undisturbed
from .filling import CannotMount, Disk, Filling
from .killing import Killing
from .lane import Lane, Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs in all lanes together")
    parser.add_argument("--disk-full", type=int, default=0, metavar="N", help="times a disk is filled")
    parser.add_argument("--seed", type=int, default=None, help="of all choices; default: the time")
    parser.add_argument("--lanes", type=int, default=3, help="runs at the same time")
    parser.add_argument("--torch-share", type=float, default=0.1, help="of the runs that train with torch")
    parser.add_argument(
        "--place", type=Path, default=None, help="where the runs lie; default: a temporary one"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each kill")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    place = options.place or Path(tempfile.mkdtemp(prefix="grd-chaos-"))
    print(
        f"chaos: seed {seed}, {options.kills} kills, {options.disk_full} full disks, in {place}", flush=True
    )
    began = time.monotonic()
    load_before = os.getloadavg()
    chaos = Chaos(options, seed, place)
    if options.kills:
        chaos.in_lanes("kill", options.kills)
    if options.disk_full:
        try:
            chaos.in_lanes("disk", options.disk_full)
        except CannotMount as error:
            print(f"SKIPPED: full disks need a small file system, which cannot be mounted here: {error}")
    tally = chaos.tally
    _report(tally, seed, time.monotonic() - began, load_before)
    if tally.violations:
        print(f"kept for a look: {place}; again: --seed {seed}")
        return 1
    shutil.rmtree(place, ignore_errors=True)
    return 0


class Wanted:
    """How many disturbances are still wanted, over all lanes."""

    def __init__(self, number: int) -> None:
        self.left = number
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0

    def give_back(self) -> None:
        with self._lock:
            self.left += 1


class Chaos:
    """All lanes of one call."""

    def __init__(self, options: argparse.Namespace, seed: int, place: Path) -> None:
        self.options, self.seed, self.place = options, seed, place
        self.tally = Tally()
        reference = Lane.make(place / "undisturbed")
        kinds = ["plain"] + (["torch"] if options.torch_share > 0 else [])
        self.expected = {kind: undisturbed(reference, kind) for kind in kinds}

    def in_lanes(self, what: str, number: int) -> None:
        """``number`` disturbances in as many lanes as were asked for."""
        wanted = Wanted(number)
        with ThreadPoolExecutor(self.options.lanes) as pool:
            lanes = [pool.submit(self._lane, what, n, wanted) for n in range(self.options.lanes)]
            for lane in lanes:
                lane.result()

    def _lane(self, what: str, number: int, wanted: Wanted) -> None:
        dice = random.Random(f"{self.seed}-{what}-{number}")
        turn = 0
        while wanted.left > 0:
            turn += 1
            name = f"{what}-{number}-{turn}"
            try:
                self._one_run(what, name, dice, wanted)
            except Violation as violation:
                with self.tally.lock:
                    self.tally.violations.append(f"{name}: {violation}")
                print(f"VIOLATION ({name}, seed {self.seed}): {violation}", flush=True)

    def _one_run(self, what: str, name: str, dice: random.Random, wanted: Wanted) -> None:
        def say(line: str) -> None:
            if self.options.verbose:
                print(f"{time.strftime('%H:%M:%S')} {name:<10} {line}", flush=True)

        kind = "torch" if what == "kill" and dice.random() < self.options.torch_share else "plain"
        place = self.place / name
        disk = Disk(place / "disk") if what == "disk" else None
        if disk is not None:
            disk.mount()
        lane = Lane.make(place, None if disk is None else disk.path / "runs")
        campaign = (Killing if disk is None else Filling)(
            lane, dice, kind, self.expected[kind], self.tally, wanted.take, wanted.give_back, say
        )
        try:
            if isinstance(campaign, Filling):
                assert disk is not None
                campaign.disk = disk
            campaign.one_run()
        except BaseException:
            lane.end()
            if disk is not None:
                disk.free()
                shutil.copytree(disk.path, place / "disk-kept", symlinks=True)
                disk.unmount()
            raise
        lane.end()
        if disk is not None:
            disk.free()
            disk.unmount()
        shutil.rmtree(place, ignore_errors=True)


def _report(tally: Tally, seed: int, seconds: float, load_before: tuple[float, ...]) -> None:
    load = os.getloadavg()
    rows = [
        ("seed", seed),
        ("kills", tally.kills),
        ("processes killed", tally.processes),
        ("full disks", tally.fillings),
        ("runs started", tally.runs),
        ("runs completed with the equal result", tally.completed),
        ("starts killed before there was a run", tally.unborn),
        ("looks killed while they recovered", tally.looks_killed),
        ("outputs older than 2 s that were looked for", tally.seen.notes_checked),
        ("oldest output that was lost (s)", round(tally.seen.youngest_lost, 2)),
        ("checkpoints verified", tally.seen.checkpoints_verified),
        ("torn lines met", tally.seen.torn_lines),
        ("temporary files met after a kill", tally.seen.temporaries),
        ("slowest end after the grace (s)", round(tally.slowest_end, 2)),
        ("slowest look that reaped (s)", round(tally.slowest_reap, 2)),
        ("seconds", round(seconds)),
        ("load before, after", f"{load_before[0]:.1f}, {load[0]:.1f}"),
        ("VIOLATIONS", len(tally.violations)),
    ]
    for name, value in rows:
        print(f"  {name:<46} {value}")
    for title, counter in (
        ("by moment", tally.by_moment),
        ("by target", tally.by_target),
        ("state afterwards", tally.by_state),
    ):
        print(f"  {title}: " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
    for violation in tally.violations:
        print(f"  violation: {violation}")


if __name__ == "__main__":
    sys.exit(main())

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

from .campaign import Tally, undisturbed_result
from .killing import Killing
from .lane import Lane, Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs in all lanes together")
    parser.add_argument("--disk-full", type=int, default=0, metavar="N", help="times a disk is filled")
    parser.add_argument("--seed", type=int, default=None, help="of all choices; default: the time")
    parser.add_argument("--lanes", type=int, default=2, help="runs at the same time")
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
    tally = Tally()
    _kill(options, seed, place, tally)
    _report(tally, seed, time.monotonic() - began, load_before)
    if tally.violations:
        print(f"kept for a look: {place}; again: --seed {seed}")
        return 1
    shutil.rmtree(place, ignore_errors=True)
    return 0


def _kill(options: argparse.Namespace, seed: int, place: Path, tally: Tally) -> None:
    left, lock = options.kills, threading.Lock()

    def take() -> bool:
        nonlocal left
        with lock:
            left -= 1
            return left >= 0

    def give_back() -> None:
        nonlocal left
        with lock:
            left += 1

    reference = Lane.make(place / "undisturbed")
    kinds = ["plain"] + (["torch"] if options.torch_share > 0 else [])
    expected = {kind: undisturbed_result(reference, kind) for kind in kinds}

    def run_lane(number: int) -> None:
        dice = random.Random(f"{seed}-{number}")
        turn = 0
        while left > 0:
            turn += 1
            kind = "torch" if dice.random() < options.torch_share else "plain"
            lane = Lane.make(place / f"lane-{number}-{turn}")

            def say(line: str, lane_number: int = number) -> None:
                if options.verbose:
                    print(f"{time.strftime('%H:%M:%S')} lane {lane_number} {line}", flush=True)

            try:
                Killing(lane, dice, kind, expected[kind], tally, take, give_back, say).one_run(more=True)
            except Violation as violation:
                with tally.lock:
                    tally.violations.append(str(violation))
                print(f"VIOLATION (lane {number}, seed {seed}): {violation}", flush=True)
            else:
                shutil.rmtree(lane.path, ignore_errors=True)
            finally:
                lane.end()

    with ThreadPoolExecutor(options.lanes) as pool:
        for future in [pool.submit(run_lane, number) for number in range(options.lanes)]:
            future.result()


def _report(tally: Tally, seed: int, seconds: float, load_before: tuple[float, ...]) -> None:
    load = os.getloadavg()
    rows = [
        ("seed", seed),
        ("kills", tally.kills),
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

"""What a folder tells about saving: its cost, what a kill would lose, how often one came, what to type."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from grd.experiment import CheckpointHandler
from grd.experiment.schedule import OVERHEAD, Every, Schedule, save_interval

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("by_hand")


def handler(folder: Path) -> CheckpointHandler:
    return CheckpointHandler(folder, install_signal_handlers=False)


def rewrite(folder: Path, *changes: dict[str, object]) -> None:
    """Give the manifest's lines, in order, these values."""
    path = folder / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(changes)
    for line in lines:
        line.pop("line_xxh3_64", None)  # it would not hold any more
    path.write_text(
        "".join(json.dumps(line | change) + "\n" for line, change in zip(lines, changes, strict=True))
    )


def test_hints_tell_what_a_kill_loses_and_what_saving_costs(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0)
    hints = keeper.get_resumability_hints()
    assert hints["expected_lost_seconds"] is None and hints["expected_overhead"] is None
    for epoch in (1, 2):
        keeper.save_checkpoint(epoch)
    work = {"seconds": 1.0, "stop": None}
    rewrite(tmp_path, {**work, "work_seconds": 9.0}, {**work, "work_seconds": 29.0},
            {**work, "work_seconds": 2.0, "stop": "sigterm"})  # fmt: skip
    hints = keeper.get_resumability_hints()
    assert hints["expected_lost_seconds"] == pytest.approx((10**2 + 30**2) / (2 * 40))
    assert hints["expected_overhead"] == pytest.approx(2 / 38)


def test_hints_name_what_to_type_and_nothing_once_the_training_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = CheckpointHandler(tmp_path, total_epochs=2, install_signal_handlers=False)
    assert keeper.get_resumability_hints()["resume_command"] is None
    keeper.save_checkpoint(0, {"w": 1})
    command = keeper.get_resumability_hints()["resume_command"]
    assert eval(command, {"CheckpointHandler": CheckpointHandler})["model_state"] == {"w": 1}
    monkeypatch.setenv("GRD_RUN_ID", "run-1")
    assert keeper.get_resumability_hints()["resume_command"] == "grd resume run-1"
    keeper.save_checkpoint(1)
    assert keeper.get_resumability_hints()["resume_command"] is None


def test_a_lower_epoch_saved_later_does_not_become_the_latest_unless_the_higher_is_damaged(
    tmp_path: Path,
) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(10)
    keeper.save_checkpoint(2)
    latest = tmp_path / "checkpoint_latest.pt"
    assert latest.samefile(tmp_path / "checkpoint_epoch_10.pt")
    (tmp_path / "checkpoint_epoch_10.pt").write_bytes(b"bad")
    code = (
        f"from grd.experiment import CheckpointHandler\nCheckpointHandler({str(tmp_path)!r}).begin_lineage()"
    )
    code += f"\nCheckpointHandler({str(tmp_path)!r}).save_checkpoint(3)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert latest.samefile(tmp_path / "checkpoint_epoch_3.pt")


def test_the_time_between_interruptions_counts_only_ends_without_warning(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch in range(4):
        keeper.save_checkpoint(epoch)
    assert keeper.seconds_between_interruptions() is None
    worked = {"work_seconds": 99.0, "seconds": 1.0}
    rewrite(tmp_path, {**worked, "process": "a"}, {**worked, "process": "b"},
            {**worked, "process": "c", "stop": "deadline"}, {**worked, "process": "d"})  # fmt: skip
    assert keeper.seconds_between_interruptions() == pytest.approx(400 / 2)


def test_a_manifest_of_an_older_version_is_still_read(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0)
    path = tmp_path / "manifest.jsonl"
    line = json.loads(path.read_text())
    for name in ("seconds", "work_seconds", "stop", "line_xxh3_64"):
        del line[name]
    path.write_text(json.dumps(line) + "\n")
    hints = keeper.get_resumability_hints()
    assert hints["valid"] and hints["expected_lost_seconds"] is None


def overhead(interval: float, cost: float, between: float, dice: random.Random) -> float:
    """Saving, repeating and restarting over useful work: 4 h, failures at random, restart 10 s."""
    useful, now, done = 4 * 3600.0, 0.0, 0.0
    failure = dice.expovariate(1 / between)
    while done < useful:
        part = min(interval, useful - done)
        if now + part + cost <= failure:
            now, done = now + part + cost, done + part
        else:
            now = failure + 10.0
            failure = now + dice.expovariate(1 / between)
    return (now - useful) / useful


def mean_overhead(interval: float, cost: float, between: float) -> float:
    dice = random.Random(7)
    return sum(overhead(interval, cost, between, dice) for _ in range(150)) / 150


@pytest.mark.parametrize(
    ("cost", "between"), [(0.25, 600.0), (0.25, 3600.0), (2.0, 3600.0), (20.0, 3600.0), (20.0, 600.0)]
)
def test_with_known_interruptions_no_other_interval_is_much_cheaper(cost: float, between: float) -> None:
    chosen = save_interval(cost, max_lost_work=300.0, between_interruptions=between)
    ours = mean_overhead(chosen, cost, between)
    others = [mean_overhead(chosen * factor, cost, between) for factor in (0.3, 0.6, 1.7, 3.0)]
    assert ours <= 1.15 * min(others)
    unknown = save_interval(cost, max_lost_work=300.0)
    assert cost / unknown <= OVERHEAD + 1e-9 or unknown == 300.0
    if (cost, between) == (20.0, 600.0):
        assert ours < 0.6 * mean_overhead(cost / OVERHEAD, cost, between)  # the rule this one replaced


def test_the_schedule_uses_the_observed_time_between_interruptions() -> None:
    schedule = Schedule(Every(), now=0.0, max_lost_work=300.0, between_interruptions=600.0)
    schedule.save_ended(1.0, 2.0, 10**9)
    assert schedule.interval == pytest.approx((2 * 2.0 * 600.0) ** 0.5)

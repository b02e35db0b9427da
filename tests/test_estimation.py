"""Durations by arithmetic, by earlier runs, by a run's first steps: what they say, what they leave unsaid."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grd import estimate_eda_duration, estimate_training_duration
from grd.estimation.before import code_sha256, estimate_before
from grd.estimation.history import Job
from grd.estimation.interval import LEAST_RUNS, PRIOR_PROBE, Factor, factor_of
from grd.estimation.live import probe_result, progress_with_interval
from grd.runs.events import LiveView

A100 = {"gpu": {"name": "NVIDIA A100-SXM4-80GB", "device_count": 1}}
CPU: dict[str, Any] = {"gpu": None, "gpus": [], "cpu": {"cores_usable": 8}, "measured": None}
MEASURED_CPU = {
    **CPU,
    "measured": {
        "compute": {
            "kind": "cpu",
            "device": None,
            "matmul": [{"dtype": "fp32", "tflops": 0.5}],
            "memory_bandwidth_gbs": 10.0,
        }
    },
}
SEED_KEYS = {
    "estimated_seconds", "estimated_minutes", "estimated_hours", "is_long_running",
    "requires_user_confirmation", "gpu_tflops", "total_tflops",
}  # fmt: skip

# --- by arithmetic ---------------------------------------------------------------------------------------


def test_the_plans_signature_gives_the_plans_keys() -> None:
    found = estimate_training_duration(1_000_000, 10, 100_000_000, A100, 64)
    assert set(found) >= SEED_KEYS
    assert found["estimated_minutes"] == found["estimated_seconds"] / 60
    assert found["estimated_hours"] == found["estimated_seconds"] / 3600
    assert found["total_tflops"] == pytest.approx(6 * 100e6 * 1e6 * 10 / 1e12)
    assert found["gpu_tflops"] == 19.5
    assert found["is_long_running"] is found["requires_user_confirmation"] is True
    assert found["low_seconds"] < found["estimated_seconds"] < found["high_seconds"]
    assert found["confidence"] == "LOW"


def test_half_of_the_peak_rate_and_a_millisecond_a_step_are_the_middle() -> None:
    found = estimate_training_duration(3200, 10, 10**9, A100, 32)
    operations = 6e9 * 3200 * 10
    assert found["low_seconds"] == pytest.approx(operations / 19.5e12)
    assert found["estimated_seconds"] == pytest.approx(2 * operations / 19.5e12 + 1000 * 0.001)


def test_a_gpu_that_is_not_known_has_no_default_rate() -> None:
    found = estimate_training_duration(1000, 1, 1000, {"gpu": {"name": "NVIDIA Z9000"}})
    assert found["estimated_seconds"] is found["high_seconds"] is found["gpu_tflops"] is None
    assert found["low_seconds"] == 0
    assert found["confidence"] == "UNKNOWN"
    assert found["requires_user_confirmation"] is True, "nothing excludes that it is long"
    assert {name for name, value in found.items() if value is None} <= set(found["reasons"])
    assert "Z9000" in found["reasons"]["estimated_seconds"]


def test_a_machine_without_a_gpu_is_estimated_by_what_was_measured_on_it_or_not_at_all() -> None:
    unknown = estimate_training_duration(1000, 1, 10**6, CPU)
    assert unknown["estimated_seconds"] is None
    assert "grd benchmark" in unknown["reasons"]["estimated_seconds"]
    known = estimate_training_duration(1000, 1, 10**6, MEASURED_CPU)
    assert known["low_seconds"] == pytest.approx(6e9 / 0.5e12)
    assert known["gpu_tflops"] is None and known["reasons"]["gpu_tflops"] == "there is no GPU"
    assert estimate_training_duration(1000, 1, 10**6, MEASURED_CPU, dtype="fp16")["estimated_seconds"] is None


def test_what_was_measured_on_another_device_is_not_taken() -> None:
    found = estimate_training_duration(1000, 1, 10**6, {**MEASURED_CPU, "gpu": {"name": "NVIDIA Z9000"}})
    assert found["estimated_seconds"] is None


def test_number_type_tokens_devices_and_batches_change_the_estimate() -> None:
    def seconds(**more: Any) -> float:
        found: float = estimate_training_duration(10_000, 3, 10**9, A100, **more)["estimated_seconds"]
        return found

    assert seconds(dtype="bf16") < seconds(dtype="tf32") < seconds()
    assert seconds(dtype="torch.bfloat16") == seconds(dtype="bf16")
    assert seconds(tokens_per_sample=512) > 300 * seconds()
    assert seconds(device_count=8) < seconds() / 5
    assert seconds(batch_size=1) > seconds() > seconds(batch_size=1024)
    counted = estimate_training_duration(10_000, 3, 1, A100, flops_per_sample=6e9)
    assert counted["estimated_seconds"] == pytest.approx(seconds())
    by_rule = estimate_training_duration(10_000, 3, 10**9, A100)
    assert counted["high_seconds"] < by_rule["high_seconds"], "counted operations are known better"


def test_eight_devices_of_the_profile_are_not_taken_for_one_nor_relied_on() -> None:
    eight = {"gpu": {"name": "NVIDIA A100-SXM4-80GB", "device_count": 8}}
    one, all_of_them = (estimate_training_duration(10**6, 3, 10**8, profile) for profile in (A100, eight))
    assert all_of_them["low_seconds"] == one["low_seconds"] / 8
    assert all_of_them["high_seconds"] == one["high_seconds"]


def test_the_threshold_decides_by_the_upper_end() -> None:
    found = estimate_training_duration(100, 1, 10**6, A100)
    assert found["is_long_running"] is False
    below, above = found["high_seconds"] * 0.99, found["high_seconds"] * 1.01
    assert estimate_training_duration(100, 1, 10**6, A100, threshold_seconds=below)["is_long_running"]
    assert not estimate_training_duration(100, 1, 10**6, A100, threshold_seconds=above)["is_long_running"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": -1},
        {"num_samples": 1.5},
        {"num_samples": math.nan},
        {"num_samples": True},
        {"num_samples": "10"},
        {"num_epochs": -3},
        {"model_params": None},
        {"batch_size": 0},
        {"device_count": 0},
        {"flops_per_sample": math.inf},
        {"flops_per_sample": -1.0},
        {"tokens_per_sample": 0},
        {"tokens_per_sample": 5, "flops_per_sample": 1.0},
        {"dtype": "int3"},
        {"threshold_seconds": math.nan},
        {"threshold_seconds": 0},
        {"hardware_profile": None},
        {"num_samples": 10**400},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused_by_name(wrong: dict[str, Any]) -> None:
    arguments = {"num_samples": 10, "num_epochs": 1, "model_params": 10, "hardware_profile": A100, **wrong}
    with pytest.raises(ValueError, match="|".join([*wrong, "more work"])):
        estimate_training_duration(**arguments)


@pytest.mark.parametrize(
    "profile",
    [
        {"gpus": 5},
        {"gpus": [1]},
        {"gpu": "A100"},
        {"measured": [1]},
        {"measured": {"compute": 3}},
        {"measured": {"compute": {"device": None, "kind": "cpu", "matmul": 7}}},
        {"measured": {"compute": {"device": None, "kind": "cpu", "matmul": [7]}}},
        [("gpus", ())],
        7,
    ],
    ids=str,
)
def test_a_profile_of_another_form_is_refused_by_name(profile: Any) -> None:
    with pytest.raises(ValueError, match="profile"):
        estimate_training_duration(10, 1, 10, profile)


@pytest.mark.parametrize("profile", [{"measured": [1]}, {"measured": {"compute": 3}}, [1], 7, "cpu"], ids=str)
def test_a_table_is_not_estimated_by_a_profile_of_another_form(profile: Any) -> None:
    with pytest.raises(ValueError, match="profile"):
        estimate_eda_duration(10, 2, profile)


def test_every_kind_of_number_is_a_measurement() -> None:
    found = estimate_eda_duration(10, 2, sample_rows=1, sample_seconds=Fraction(1, 2))  # type: ignore[arg-type]
    assert found["estimated_seconds"] == 5
    numpy = pytest.importorskip("numpy")
    flops = numpy.float32(1000)
    assert estimate_training_duration(numpy.int64(10), 1, 10, A100, flops_per_sample=flops)
    huge = {"measured": {"compute": {"kind": "cpu", "memory_bandwidth_gbs": 10**400}}}
    assert estimate_eda_duration(10, 2, huge)["low_seconds"] == 0
    with pytest.raises(ValueError, match="threshold_seconds"):
        estimate_eda_duration(10, 2, threshold_seconds=10**400)


COUNTS = st.integers(0, 10**9)


@given(COUNTS, st.integers(0, 1000), COUNTS, st.integers(1, 4096), st.sampled_from([A100, MEASURED_CPU]))
def test_more_work_never_takes_less_time_and_no_end_is_negative(
    samples: int, epochs: int, parameters: int, batch: int, profile: dict[str, Any]
) -> None:
    found = estimate_training_duration(samples, epochs, parameters, profile, batch)
    low, middle, high = (found[name] for name in ("low_seconds", "estimated_seconds", "high_seconds"))
    assert 0 <= low <= middle <= high < math.inf
    for more in (
        (samples + 1, epochs, parameters, profile, batch),
        (samples, epochs + 1, parameters, profile, batch),
        (samples, epochs, parameters + 1, profile, batch),
    ):
        bigger = estimate_training_duration(*more)
        assert all(
            bigger[name] >= found[name] for name in ("low_seconds", "estimated_seconds", "high_seconds")
        )
    assert estimate_training_duration(samples, epochs, parameters, profile, batch + 1)[
        "estimated_seconds"
    ] <= (middle)


def test_exploring_data_is_unknown_until_a_sample_was_measured() -> None:
    unknown = estimate_eda_duration(10**9, 20, MEASURED_CPU)
    assert unknown["estimated_seconds"] is None and unknown["confidence"] == "UNKNOWN"
    assert unknown["low_seconds"] == pytest.approx(10**9 * 20 * 8 / 10e9)
    assert unknown["requires_user_confirmation"] is True
    assert estimate_eda_duration(10**9, 20)["low_seconds"] == 0
    known = estimate_eda_duration(10**6, 20, CPU, sample_rows=1000, sample_seconds=0.1)
    assert known["estimated_seconds"] == pytest.approx(100)
    assert (known["low_seconds"], known["high_seconds"]) == (pytest.approx(50), pytest.approx(200))
    assert known["is_long_running"] is False and known["confidence"] == "LOW"


@pytest.mark.parametrize(
    "wrong",
    [{"num_rows": -1}, {"num_columns": 0.5}, {"sample_rows": 5}, {"sample_rows": 0, "sample_seconds": 1.0}],
    ids=str,
)
def test_a_table_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        estimate_eda_duration(**{"num_rows": 10, "num_columns": 3, **wrong})


# --- the interval ----------------------------------------------------------------------------------------


def test_until_ten_runs_have_ended_the_factor_is_the_stated_one() -> None:
    assert factor_of([(1.0, 1.0)] * (LEAST_RUNS - 1), PRIOR_PROBE) == Factor(value=2.0, n=0)
    assert "assumed" in factor_of([], PRIOR_PROBE).how


def test_from_ten_runs_on_it_is_their_ninth_of_ten_error_in_whichever_direction() -> None:
    errors = [(100.0, 100.0 * 1.1 ** ((-1) ** i * i)) for i in range(1, 20)]
    learned = factor_of(errors, PRIOR_PROBE)
    assert (learned.n, learned.value) == (19, pytest.approx(1.1**18))  # ceil(20 * 0.9)-th of 19
    assert learned.around(100.0) == (pytest.approx(100 / 1.1**18), pytest.approx(100 * 1.1**18))
    assert "19 predictions" in learned.how


POSITIVE = st.floats(1e-3, 1e6)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), max_size=60), POSITIVE)
def test_an_interval_holds_its_prediction_and_nine_of_ten_of_what_it_was_learned_from(
    errors: list[tuple[float, float]], seconds: float
) -> None:
    factor = factor_of(errors, PRIOR_PROBE)
    low, high = factor.around(seconds)
    assert 0 < low <= seconds <= high < math.inf
    if factor.n and factor.value < 1e6:
        inside = sum(
            predicted / factor.value * (1 - 1e-9) <= real <= predicted * factor.value * (1 + 1e-9)
            for predicted, real in errors
        )
        assert inside >= 0.9 * len(errors)


def test_what_is_no_duration_teaches_nothing() -> None:
    nonsense = [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 2.0)] * 10
    assert factor_of(nonsense, PRIOR_PROBE).n == 0


def test_new_runs_like_the_old_ones_are_covered_nine_times_of_ten() -> None:
    """Exchangeable errors of any spread: that is all the method asks for."""
    chance, inside, rounds = random.Random(1), 0, 2000
    for _ in range(rounds):
        errors = [(1.0, chance.lognormvariate(0, 0.3)) for _ in range(30)]
        low, high = factor_of(errors, PRIOR_PROBE).around(1.0)
        inside += low <= chance.lognormvariate(0, 0.3) <= high
    assert 0.88 < inside / rounds < 0.93


# --- while it runs ---------------------------------------------------------------------------------------


def training(
    epochs: int,
    steps: int,
    step_seconds: float,
    end_seconds: float = 0.0,
    *,
    start: float = 0.0,
    first: int = 0,
    done: int = 0,
    report: float = 0.25,
    warm_up: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Progress events as `training.epochs` with `epoch.steps` writes them, of a clock that is made up."""
    t, last = start, -math.inf
    yield {"kind": "state", "state": "running", "t": t}
    if done:
        yield {"kind": "resume", "epoch": first, "step": done, "t": t}
    yield {"kind": "progress", "name": "epochs", "n": first, "total": epochs, "t": t}
    t += warm_up
    for epoch in range(first, epochs):
        for step in range(done if epoch == first else 0, steps):
            t += step_seconds
            if t - last >= report:
                last = t
                share = (step + 1) / steps
                yield {
                    "kind": "progress", "name": "epochs", "n": round(epoch + share, 3), "total": epochs,
                    "step": step + 1, "steps": steps, "t": t,
                }  # fmt: skip
        t += end_seconds / 2  # validation
        yield {"kind": "progress", "name": "epochs", "n": epoch + 1, "total": epochs, "t": t}
        t += end_seconds / 2  # checkpoint


def seen(events: Iterator[dict[str, Any]], until: float, view: LiveView | None = None) -> LiveView:
    """What somebody knows who looks at ``until``."""
    view = view or LiveView()
    for event in events:
        if event["t"] > until:
            break
        view.take(event)
    return view


def shown(view: LiveView, estimate: dict[str, Any] | None = None) -> dict[str, Any]:
    progress = progress_with_interval(view, estimate)
    assert progress is not None
    return progress


def test_the_first_steps_are_the_probe_and_until_it_is_over_there_is_no_interval() -> None:
    early = shown(seen(training(100, 50, 0.1), 9.0))
    assert early["eta_low_seconds"] is early["eta_high_seconds"] is None
    assert early["eta_seconds"] == pytest.approx(491, rel=0.01) and "too little" in early["eta_basis"]
    # 5 % of 500 s are 25 s, which is more than 20 steps and 10 s.
    assert shown(seen(training(100, 50, 0.1), 24.0))["eta_high_seconds"] is None
    late = shown(seen(training(100, 50, 0.1), 28.0))
    assert late["eta_low_seconds"] == pytest.approx(late["eta_seconds"] / 2, abs=0.1)
    assert late["eta_high_seconds"] == pytest.approx(late["eta_seconds"] * 2, abs=0.1)
    assert "assumed" in late["eta_basis"]


def test_a_minute_is_enough_however_long_the_steps_take() -> None:
    view = seen(training(100, 50, 8.0), 75.0)  # 9 steps, 0.2 %
    assert shown(view)["eta_seconds"] == pytest.approx(100 * 50 * 8, rel=0.01)
    assert shown(view)["eta_high_seconds"] is not None


def test_validation_and_checkpoints_at_the_end_of_epochs_are_counted_once_an_epoch() -> None:
    # 10 epochs of 20 s of steps and 10 s of validation and checkpoint: 300 s in all.
    view = seen(training(10, 200, 0.1, 10.0), 75.0)  # in the middle of the third epoch
    assert shown(view)["eta_seconds"] == pytest.approx(300 - 75, rel=0.02)
    unseen = shown(seen(training(10, 200, 0.1, 10.0), 15.0))
    assert "not seen yet" in unseen["eta_basis"]


def test_a_second_pass_over_data_in_an_epoch_is_no_other_loop() -> None:
    view = LiveView()
    for event in training(10, 200, 0.1, 10.0):
        if event["t"] > 75:
            break
        if event["kind"] == "progress" and "step" not in event and event["n"] > 0:
            for step in range(1, 6):  # validation with epoch.steps, before the end of the epoch is told
                share = {"n": event["n"] - 1 + step / 5, "step": step, "steps": 5}
                view.take({**event, **share, "t": event["t"] - 5 + step})
        view.take(event)
    assert shown(view)["eta_seconds"] == pytest.approx(300 - 75, rel=0.02)


def test_work_that_a_resume_skipped_is_no_speed_and_what_epochs_end_with_is_still_known() -> None:
    whole = training(10, 200, 0.1, 10.0)
    view = seen(whole, 75.0)
    # Killed there; the second attempt begins 1000 s later inside the epoch.
    view = seen(training(10, 200, 0.1, 10.0, start=1000.0, first=2, done=150), 1004.0, view)
    left = 5.0 - 4.0 + 10 + 7 * 30
    assert shown(view)["eta_seconds"] == pytest.approx(left, rel=0.05)
    fresh = seen(training(10, 200, 0.1, 10.0, start=1000.0, first=2, done=150), 1004.0)
    assert shown(fresh)["eta_seconds"] == pytest.approx(left - 80, rel=0.05), "without its first attempt"
    assert shown(fresh)["per_second"] == pytest.approx(1 / 20, rel=0.1)


def test_a_slow_start_is_counted_once() -> None:
    view = seen(training(10, 200, 0.1, warm_up=60.0), 75.0)
    assert shown(view)["eta_seconds"] == pytest.approx(200 - 15, rel=0.02)
    bar = LiveView()
    for n in range(50):
        t = 0.0 if n == 0 else 60.0 + n
        bar.take({"kind": "progress", "name": "bar", "n": n, "total": 100, "t": t})
    assert shown(bar)["eta_seconds"] == pytest.approx(51)


def test_what_holds_steps_up_now_and_then_is_part_of_the_time() -> None:
    view = LiveView()
    view.take({"kind": "progress", "name": "bar", "n": 0, "total": 1000, "t": 0.0})
    t = 0.0
    for n in range(1, 101):
        t += 3.0 if n % 20 == 0 else 0.1
        view.take({"kind": "progress", "name": "bar", "n": n, "total": 1000, "t": t})
    assert shown(view)["eta_seconds"] == pytest.approx(9 * t, rel=0.02)  # their median would say 90


def test_a_loop_without_a_total_has_no_time_left_and_says_why() -> None:
    view = LiveView()
    for n in range(50):
        view.take({"kind": "progress", "name": "bar", "n": n, "total": None, "t": float(n)})
    assert shown(view)["eta_seconds"] is None
    assert "not told" in shown(view)["eta_basis"]
    assert progress_with_interval(LiveView(), None) is None


def test_ten_ended_runs_make_the_interval_theirs() -> None:
    view = seen(training(10, 200, 0.1), 50.0)
    learned = shown(view, {"live_factor": 1.1, "live_runs": 12})
    assert learned["eta_high_seconds"] == pytest.approx(learned["eta_seconds"] * 1.1, abs=0.1)
    assert "12 predictions" in learned["eta_basis"]


def test_what_the_probe_predicted_is_kept_with_what_came_of_it() -> None:
    view = seen(training(10, 200, 0.1, 10.0), math.inf)
    result = probe_result(view)
    assert result is not None
    # Over after 5 % of 10 epochs and 10 s: within the first epoch, whose end nobody had seen by then.
    assert 10 <= result["after_seconds"] < 12
    assert result["remaining_seconds"] == pytest.approx(200 - result["after_seconds"], rel=0.02)
    assert result["took_seconds"] == pytest.approx(295 - result["after_seconds"], rel=0.02)
    assert probe_result(seen(training(10, 200, 0.1), 50.0)) is None, "it has not come to its end"
    assert probe_result(seen(training(2, 5, 0.1), math.inf)) is None, "shorter than a probe"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 60),
    st.floats(0.01, 20),
    st.floats(0, 30),
    st.floats(0, 1),
    st.floats(0, 30),
)
def test_a_steady_training_is_predicted_from_wherever_somebody_looks(
    epochs: int, steps: int, step: float, end: float, when: float, warm_up: float
) -> None:
    total = epochs * (steps * step + end) + warm_up
    view = seen(training(epochs, steps, step, end, warm_up=warm_up), when * total)
    if view.progress is None:
        return
    progress = shown(view)
    eta = progress["eta_seconds"]
    assert eta is None or 0 <= eta < math.inf
    if progress["eta_high_seconds"] is not None:
        assert 0 <= progress["eta_low_seconds"] <= eta <= progress["eta_high_seconds"]
    json.dumps(view.to_dict(), allow_nan=False)
    assert LiveView.from_dict(json.loads(json.dumps(view.to_dict()))) == view


HUGE = 10**400
"""A whole number beyond every float, as a notebook may tell or somebody may type it."""

NUMBERS = st.floats(allow_nan=True) | st.sampled_from([HUGE, -HUGE, 10])


def test_a_resumed_run_has_no_time_left_until_it_tells_its_own_progress() -> None:
    view = LiveView()
    for n in range(5):
        view.take({"kind": "progress", "name": "epochs", "n": n, "total": 10, "t": 100.0 * n})
    assert shown(view)["eta_seconds"] == pytest.approx(600)
    view.take({"kind": "state", "state": "running", "t": 9000.0})
    waiting = shown(view)
    assert (waiting["eta_seconds"], waiting["n"], waiting["total"]) == (None, 4, 10)
    assert waiting["eta_basis"] == "this attempt has not told its progress yet"


@given(
    st.lists(st.tuples(NUMBERS, st.floats(-10, 1e9), st.integers(-3, 30)), max_size=30), NUMBERS | st.just(10)
)
def test_whatever_a_notebook_tells_of_its_progress_the_time_left_is_a_number_or_null(
    told: list[tuple[float, float, int]], total: float
) -> None:
    view = LiveView()
    for n, t, steps in told:
        event = {"kind": "progress", "name": "x", "n": n, "total": total, "t": t, "step": 1, "steps": steps}
        view.take({**event, "samples": n})
    if view.progress is not None:
        eta = shown(view)["eta_seconds"]
        assert eta is None or 0 <= eta < math.inf


# --- by earlier runs -------------------------------------------------------------------------------------

NOTEBOOK = {"cells": [{"cell_type": "code", "source": "train()"}]}
JOB = Job(
    notebook="/p/train.ipynb",
    sha256="f1",
    code_sha256="c1",
    defaults={"epochs": 10, "lr": 0.1},
    parameters={},
)


def run_json(**more: Any) -> dict[str, Any]:
    """A completed run of JOB's notebook: 100 s, of which 80 s were 10 epochs."""
    seconds, estimate = more.pop("seconds", 100.0), more.pop("estimate", {})
    return {
        "schema": "grd.run/1",
        "notebook": "/p/train.ipynb",
        "notebook_sha256": "f1",
        "state": "completed",
        "parameters": {},
        "progress": {"name": "epochs", "n": 10, "total": 10, "per_second": 0.125, "eta_seconds": 0.0},
        "attempts": [
            {"seconds": seconds, "notebook_sha256": more.get("notebook_sha256", "f1"), "changes": {}}
        ],
        "estimate": {"code_sha256": "c1", "speed_mbs": 1000.0, **estimate},
        **more,
    }


def write_runs(folder: Path, *records: dict[str, Any]) -> Path:
    """A runs folder with these runs, the newest last."""
    for index, record in enumerate(records):
        run = folder / f"20260101-{index:06}-train-{index:04x}"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"run_id": run.name, **record}))
    return folder


def estimate(runs: Path, job: Job = JOB, speed: float | None = 1000.0, fingerprint: str | None = None) -> Any:
    return estimate_before(job, runs, speed=speed, profile=lambda: {"fingerprint": fingerprint}).estimate


def given_parameters(**parameters: Any) -> Job:
    return Job(**{**vars(JOB), "parameters": parameters})


def test_without_an_earlier_run_nothing_is_known_but_that_a_kernel_must_start(tmp_path: Path) -> None:
    found = estimate(tmp_path / "none")
    assert (found.seconds, found.high, found.confidence, found.n_runs) == (None, None, "UNKNOWN", 0)
    assert found.low > 0 and found.exceeds(600) is None


def test_the_same_run_again_takes_as_long_as_before_within_the_stated_factor(tmp_path: Path) -> None:
    found = estimate(write_runs(tmp_path, run_json(), run_json(seconds=120.0), run_json(seconds=110.0)))
    assert found.seconds == pytest.approx(110.0)
    assert (found.low, found.high) == (pytest.approx(110 / 3), pytest.approx(330))
    assert (found.method, found.confidence, found.n_runs) == ("history", "LOW", 3)
    assert found.exceeds(600) is False and found.exceeds(300) is True


def test_twice_the_epochs_take_twice_the_loop_and_what_is_around_it_once(tmp_path: Path) -> None:
    found = estimate(write_runs(tmp_path, run_json()), given_parameters(epochs=20))
    assert found.seconds == pytest.approx(20 + 2 * 80)
    assert "epochs 10 to 20" in found.basis
    assert found.method == "history"


def test_a_size_that_only_its_value_gives_away_scales_too(tmp_path: Path) -> None:
    job = Job(**{**vars(JOB), "defaults": {"generations": 10}, "parameters": {"generations": 30}})
    assert estimate(write_runs(tmp_path, run_json()), job).seconds == pytest.approx(20 + 3 * 80)


def test_other_parameters_and_other_versions_count_less_and_are_named(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json())
    other = estimate(runs, given_parameters(lr=0.2))
    assert other.method == "similar" and "other lr" in other.basis
    edited = estimate(runs, Job(**{**vars(JOB), "sha256": "f2", "code_sha256": "c2"}))
    assert edited.method == "similar" and "another version" in edited.basis
    exact = estimate(runs)
    assert other.high > exact.high and edited.high > exact.high
    assert (
        estimate(
            runs, Job(**{**vars(JOB), "notebook": "/p/b.ipynb", "sha256": "x", "code_sha256": "y"})
        ).n_runs
        == 0
    )


def test_a_notebook_whose_outputs_alone_changed_is_the_same(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json(notebook_sha256="saved-with-outputs"))
    assert estimate(runs, Job(**{**vars(JOB), "notebook": "/moved.ipynb"})).method == "history"
    with_output = {
        "cells": [{"cell_type": "code", "source": ["tra", "in()"], "outputs": [1]}, {"cell_type": "markdown"}]
    }
    assert code_sha256(NOTEBOOK) == code_sha256(with_output)
    assert code_sha256(NOTEBOOK) != code_sha256({"cells": [{"cell_type": "code", "source": "train(2)"}]})


def test_a_size_beyond_every_float_is_unknown_and_no_error(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json())
    assert estimate(runs).seconds == pytest.approx(100)
    found = estimate(runs, given_parameters(epochs=HUGE))
    assert (found.seconds, found.method) == (None, "unknown")
    assert "longer than can be reckoned" in found.basis
    assert estimate(runs, given_parameters(epochs=-HUGE)).high is not None
    of_huge = run_json(
        seconds=HUGE, state="interrupted", progress={"n": HUGE, "total": HUGE, "eta_seconds": HUGE}
    )
    assert estimate(write_runs(tmp_path / "other", of_huge)).seconds is None


def test_the_run_most_like_it_is_taken_not_the_newest(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json(), run_json(seconds=5000.0, parameters={"lr": 9.0}))
    assert estimate(runs).seconds == pytest.approx(100)


def test_an_interrupted_run_counts_by_what_it_had_left(tmp_path: Path) -> None:
    half = {"name": "epochs", "n": 5, "total": 10, "per_second": 0.125, "eta_seconds": 40.0}
    found = estimate(write_runs(tmp_path, run_json(state="interrupted", seconds=60.0, progress=half)))
    assert found.seconds == pytest.approx(100) and "interrupted run" in found.basis


def test_a_run_that_was_stopped_without_a_word_of_progress_is_a_lower_bound(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json(state="interrupted", seconds=700.0, progress=None))
    found = estimate(runs)
    assert (found.seconds, found.low, found.exceeds(600)) == (None, 700.0, True)
    assert estimate(runs, given_parameters(epochs=2)).low < 700, "a smaller one may be shorter"


def test_what_failed_or_was_changed_on_the_way_says_nothing(tmp_path: Path) -> None:
    changed = run_json()
    changed["attempts"].append({"seconds": 50.0, "changes": {"parameters": {"epochs": {}}}})
    assert estimate(write_runs(tmp_path, run_json(state="failed"), changed)).seconds is None


def test_a_machine_that_is_slower_now_makes_it_longer_and_the_interval_holds_both(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json())
    slower = estimate(runs, speed=625.0)
    assert slower.seconds == pytest.approx(160) and "slower now" in slower.basis
    assert slower.low == pytest.approx(100 / 3) and slower.high == pytest.approx(480)
    assert estimate(runs, speed=1.0).seconds == pytest.approx(200), "so short a look is believed up to two"
    without = estimate(runs, speed=None)
    assert without.seconds == pytest.approx(100) and "not compared" in without.basis
    assert without.high > estimate(runs).high


def test_another_machine_is_said_and_on_a_gpu_the_processors_load_does_not_count(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, run_json())
    run = next(runs.iterdir())
    (run / "hardware.json").write_text(json.dumps({"fingerprint": "a", "gpus": []}))
    assert estimate(runs, fingerprint="a").method == "history"
    assert "another machine" in estimate(runs, fingerprint="b").basis
    (run / "hardware.json").write_text(json.dumps({"fingerprint": "a", "gpus": [{"name": "x"}]}))
    assert estimate(runs, fingerprint="a", speed=500.0).seconds == pytest.approx(100)


def test_ten_predictions_that_came_out_make_the_interval_and_never_less_make_more_than_low(
    tmp_path: Path,
) -> None:
    predicted = {"method": "history", "seconds": 100.0}
    few = [run_json(seconds=105.0, estimate=predicted) for _ in range(9)]
    assert estimate(write_runs(tmp_path / "few", *few)).confidence == "LOW"
    enough = estimate(write_runs(tmp_path / "enough", *few, *few))
    assert enough.confidence == "MEDIUM"
    assert enough.high == pytest.approx(105 * 1.05)
    assert estimate(write_runs(tmp_path / "many", *few * 4)).confidence == "HIGH"


def test_probes_that_came_out_make_the_live_interval(tmp_path: Path) -> None:
    probe = {"name": "epochs", "remaining_seconds": 100.0, "took_seconds": 120.0}
    runs = write_runs(tmp_path, *[run_json(estimate={"probe": probe}) for _ in range(12)])
    stored = estimate_before(JOB, runs).to_record()
    assert (stored["live_factor"], stored["live_runs"]) == (pytest.approx(1.2), 12)


@settings(deadline=None, max_examples=40)
@given(epochs=st.integers(1, 10**6), speed=st.one_of(st.none(), st.floats(0, 1e9)), seconds=st.floats(0, 1e7))
def test_more_epochs_never_take_less_and_the_interval_holds_the_estimate(
    tmp_path_factory: pytest.TempPathFactory, epochs: int, speed: float | None, seconds: float
) -> None:
    runs = write_runs(tmp_path_factory.mktemp("runs"), run_json(seconds=seconds))
    found = estimate(runs, given_parameters(epochs=epochs), speed)
    assert 0 <= found.low <= found.seconds <= found.high < math.inf
    assert estimate(runs, given_parameters(epochs=epochs + 1), speed).seconds >= found.seconds


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"run_id": 1}', '{"attempts": []}', '{"estimate": 5}'])
def test_a_damaged_record_hides_only_its_own_run(tmp_path: Path, damage: str) -> None:
    runs = write_runs(tmp_path, run_json(), run_json())
    (max(runs.iterdir()) / "run.json").write_text(damage)
    assert estimate(runs).n_runs == 1


def test_a_thousand_runs_cost_less_than_a_second_of_processor_time(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, *[run_json(warnings=["x" * 100] * 30) for _ in range(1000)])
    began = time.process_time()
    assert estimate(runs).n_runs == 5
    assert time.process_time() - began < 1.0

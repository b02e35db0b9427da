"""``retry_on_timeout``, the pauses between tries, and the settings of both."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from nbclient.exceptions import CellTimeoutError

import grd
from grd import retry_on_timeout
from grd.backoff import ceiling, full_jitter
from grd.errors import ApprovalDeclined, CommandTimedOut, ConfigurationError
from grd.settings import ROLES, Settings, get_settings, load_settings


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_three_retries_are_three_calls_with_two_doubling_pauses(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    @retry_on_timeout(max_retries=3)
    def slow() -> None:
        """Its doc."""
        calls.append(1)
        raise TimeoutError(f"call {len(calls)}")

    with pytest.raises(TimeoutError, match="call 3"):
        slow()
    assert (len(calls), pauses) == (3, [2.0, 4.0])
    assert (slow.__name__, slow.__doc__) == ("slow", "Its doc.")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "attempt 2 of 3 follows in 2 s" in told[0]


def test_a_method_is_called_again_with_its_arguments_and_its_value_returned(pauses: list[float]) -> None:
    class Historian:
        def __init__(self) -> None:
            self.seen: list[int] = []

        @retry_on_timeout(max_retries=3, initial_delay=0.5)
        def update(self, cycle_id: int) -> str:
            self.seen.append(cycle_id)
            if len(self.seen) < 3:
                raise TimeoutError
            return "done"

    historian = Historian()
    assert historian.update(7) == "done"
    assert (historian.seen, pauses) == ([7, 7, 7], [0.5, 1.0])


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (TimeoutError("t"), 2),
        (subprocess.TimeoutExpired("cmd", 1), 2),
        (CellTimeoutError("t"), 2),
        (CommandTimedOut(), 2),
        (ApprovalDeclined("no"), 1),
        (ValueError("v"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_only_timeouts_are_tried_again(error: BaseException, calls: int, pauses: list[float]) -> None:
    made = []

    @retry_on_timeout(max_retries=2)
    def fails() -> None:
        made.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        fails()
    assert caught.value is error
    assert len(made) == calls


def test_a_coroutine_function_is_awaited_again() -> None:
    calls = []

    @retry_on_timeout(max_retries=3, initial_delay=0.001)
    async def slow(value: int) -> int:
        calls.append(value)
        if len(calls) < 3:
            raise TimeoutError
        return value

    assert asyncio.run(slow(5)) == 5
    assert calls == [5, 5, 5]


def test_a_stop_ends_the_pause_and_the_last_error_is_raised() -> None:
    stop, calls = threading.Event(), []

    @retry_on_timeout(max_retries=5, initial_delay=600.0, stop=stop)
    def slow() -> None:
        calls.append(1)
        threading.Timer(0.1, stop.set).start()
        raise TimeoutError("first")

    with pytest.raises(TimeoutError, match="first"):
        slow()
    assert calls == [1]


def test_nonsense_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match="the first included"):
        retry_on_timeout(max_retries=0)
    with pytest.raises(ValueError, match="below zero"):
        retry_on_timeout(initial_delay=-1)


def test_pauses_double_up_to_a_longest_and_are_drawn_from_zero_to_that() -> None:
    assert [ceiling(n, 5.0, 60.0) for n in (1, 2, 3, 4, 5, 1000)] == [5, 10, 20, 40, 60, 60]
    assert full_jitter(3, 5.0, 60.0, draw=lambda: 0.0) == 0
    assert full_jitter(3, 5.0, 60.0, draw=lambda: 0.5) == 10
    assert all(0 <= full_jitter(2, 1.0) <= 2 for _ in range(200))


def settings(tmp_path: Path, **environment: str) -> Settings:
    return load_settings(tmp_path, environment=environment, user_file=tmp_path / "none.toml")[0]


def test_each_role_has_a_timeout_that_the_environment_can_move(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert {role: found.timeout_for(role) for role in ROLES} == {
        "explore": 600, "train": 3600, "evaluate": 600, "aggregate": 600
    }  # fmt: skip
    assert found.timeout_for("something else") == found.default_timeout == 600
    assert settings(tmp_path, GRD_TRAIN_TIMEOUT="2h").timeout_for("train") == 7200
    assert settings(tmp_path, GRD_MAX_ATTEMPTS="4", GRD_RETRY_DELAY="0.5").retry_delay == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("explore_timeout", "59s"),
        ("explore_timeout", "31m"),
        ("aggregate_timeout", "1h"),
        ("train_timeout", "8d"),
        ("max_attempts", "0"),
        ("max_attempts", "101"),
        ("max_attempts", "2.5"),
        ("min_epochs", "0"),
        ("default_epochs", "101"),
        ("base_batch_size", "257"),
        ("batch_size_per_gpu", "129"),
        ("retry_delay", "2h"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_where_it_stands(
    name: str, value: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"GRD_{name.upper()}: {name}"):
        settings(tmp_path, **{f"GRD_{name.upper()}": value})


def test_epochs_and_batch_sizes_have_the_plans_defaults_and_fit_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settings(tmp_path)
    assert (found.min_epochs, found.default_epochs) == (3, 5)
    assert (found.base_batch_size, found.batch_size_per_gpu) == (16, 16)
    assert settings(tmp_path, GRD_BASE_BATCH_SIZE="32").batch_size_per_gpu == 32
    assert settings(tmp_path, GRD_BASE_BATCH_SIZE="32", GRD_BATCH_SIZE_PER_GPU="8").batch_size_per_gpu == 8
    with pytest.raises(ConfigurationError, match="min_epochs"):
        settings(tmp_path, GRD_MIN_EPOCHS="6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GRD_AGGREGATE_TIMEOUT", "90")
    assert get_settings().timeout_for("aggregate") == 90


def test_the_decorator_is_public() -> None:
    kept: Any = grd.retry_on_timeout
    assert kept is retry_on_timeout


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"initial_delay": float("nan")}, ValueError),
        ({"initial_delay": "2"}, TypeError),
        ({"max_delay": True}, TypeError),
        ({"max_retries": 1.5}, TypeError),
        ({"max_retries": True}, TypeError),
        ({"max_retries": test_three_retries_are_three_calls_with_two_doubling_pauses}, TypeError),
    ],
)
def test_what_is_no_number_of_calls_or_seconds_is_refused_at_once(
    wrong: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=next(iter(wrong)) if kind is ValueError else None):
        retry_on_timeout(**wrong)


def test_a_command_that_outlives_its_time_is_really_run_again() -> None:
    began: list[float] = []

    @retry_on_timeout(max_retries=3, initial_delay=0.2)
    def command() -> Any:
        began.append(time.monotonic())
        return grd.run_with_timeout(["sleep", "60" if len(began) < 3 else "0"], 0.5)

    command()
    assert len(began) == 3
    assert began[1] - began[0] >= 0.5 + 0.2
    assert began[2] - began[1] >= 0.5 + 0.4

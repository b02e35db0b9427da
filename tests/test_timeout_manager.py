"""Agreement to long runs: what is granted, for how long, and what is remembered."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from grd.errors import ApprovalDeclined
from grd.experiment.timeout_manager import ExperimentTimeoutManager


def yes(minutes: float) -> tuple[bool, str]:
    return True, "a test"


def no(minutes: float) -> bool:
    return False


def test_a_fresh_manager_has_the_plans_attributes() -> None:
    manager = ExperimentTimeoutManager()
    assert manager.default_timeout == 600
    assert manager.long_running_approved is False
    assert manager.session_timeout is None
    assert isinstance(manager.approval_metadata, dict)


def test_an_unapproved_long_run_gets_the_default() -> None:
    assert ExperimentTimeoutManager().get_timeout(3600) == 600
    assert ExperimentTimeoutManager(60).get_timeout(3600) == 60


def test_the_threshold_and_the_default_are_two_things() -> None:
    manager = ExperimentTimeoutManager(60, approver=yes)
    manager.request_long_running_approval(30)
    assert manager.get_timeout(300) == 60
    assert manager.get_timeout(601) is None


def test_the_approver_is_asked_once_a_session_and_told_the_minutes() -> None:
    asked = []

    def approver(minutes: float) -> bool:
        asked.append(minutes)
        return True

    manager = ExperimentTimeoutManager(approver=approver)
    assert manager.request_long_running_approval(30)
    assert manager.request_long_running_approval(45)
    assert asked == [30]


def test_a_bare_manager_without_a_terminal_says_that_it_granted_itself() -> None:
    manager = ExperimentTimeoutManager()
    assert manager.request_long_running_approval(30)
    metadata = manager.get_approval_metadata()
    assert metadata["granted_by"] == "programmatic"
    assert metadata["estimated_minutes"] == 30
    assert metadata["at"].endswith("+00:00")


def test_a_refusal_is_recorded_and_leaves_the_default() -> None:
    manager = ExperimentTimeoutManager(approver=no)
    assert manager.request_long_running_approval(30) is False
    assert manager.session_timeout == 600
    assert manager.get_timeout(3600) == 600
    assert manager.get_approval_metadata()["history"][-1]["approved"] is False


def test_taking_an_approval_back_keeps_its_history() -> None:
    manager = ExperimentTimeoutManager(approver=yes)
    manager.request_long_running_approval(30)
    manager.reset_approval()
    assert not manager.long_running_approved
    assert manager.session_timeout is None
    assert [entry["event"] for entry in manager.get_approval_metadata()["history"]] == ["decision", "reset"]


def test_the_metadata_handed_out_is_a_copy() -> None:
    manager = ExperimentTimeoutManager(approver=yes)
    manager.request_long_running_approval(30)
    manager.get_approval_metadata()["history"].clear()
    assert len(manager.get_approval_metadata()["history"]) == 1


def test_an_approval_lapses_with_the_sessions_cap() -> None:
    manager = ExperimentTimeoutManager(max_session_seconds=0.05, approver=yes)
    manager.request_long_running_approval(30)
    assert manager.get_timeout(3600) is None
    assert manager.effective_timeout(3600) <= 0.05
    time.sleep(0.06)
    assert manager.remaining_session_seconds() == 0
    assert manager.get_timeout(3600) == 600
    assert not manager.long_running_approved


def test_a_clock_set_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = ExperimentTimeoutManager(approver=yes)
    manager.request_long_running_approval(30)
    before = manager.remaining_session_seconds()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert manager.remaining_session_seconds() <= before <= 14400


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, True, "10"])
def test_an_estimate_that_is_no_duration_is_refused(bad: float) -> None:
    manager = ExperimentTimeoutManager(approver=yes)
    manager.request_long_running_approval(30)
    for question in (
        manager.get_timeout,
        manager.request_long_running_approval,
        manager.effective_timeout,
        manager.experiment_context,
    ):
        with pytest.raises(ValueError):
            question(bad)


def test_the_context_hands_out_the_time_that_was_granted() -> None:
    manager = ExperimentTimeoutManager(approver=yes)
    with manager.experiment_context(3600) as budget:
        assert budget.timeout is not None and 0 < budget.timeout <= 14400
        assert budget.deadline is not None
        budget.check()
    with ExperimentTimeoutManager(approver=no).experiment_context(10) as budget:
        assert budget.timeout == 600


def test_a_declined_context_raises_a_timeout_error_of_its_own() -> None:
    manager = ExperimentTimeoutManager(approver=no)
    with pytest.raises(ApprovalDeclined) as caught, manager.experiment_context(3600):
        raise AssertionError("the body must not run")
    assert isinstance(caught.value, TimeoutError)


def test_check_raises_once_the_time_is_used_up() -> None:
    manager = ExperimentTimeoutManager(approver=yes, max_session_seconds=0.02)
    with manager.experiment_context(3600) as budget:
        while budget.remaining():
            time.sleep(0.005)
        with pytest.raises(TimeoutError):
            budget.check()


def test_the_async_forms_do_not_hold_up_the_event_loop() -> None:
    order = []

    def slow(minutes: float) -> bool:
        asyncio.run_coroutine_threadsafe(_note(), loop).result(timeout=10)
        return True

    async def _note() -> None:
        order.append("the loop went on")

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with ExperimentTimeoutManager(approver=slow).experiment_context(3600) as budget:
            order.append("granted")
            assert budget.timeout is not None

    loop: asyncio.AbstractEventLoop
    asyncio.run(main())
    assert order == ["the loop went on", "granted"]

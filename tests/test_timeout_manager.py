"""Agreement to long runs: what is granted, for how long, and what is remembered."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
import time
from fractions import Fraction

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


def test_an_approval_after_the_sessions_cap_begins_a_new_session(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.monotonic
    manager = ExperimentTimeoutManager(max_session_seconds=3600, approver=yes)
    manager.request_long_running_approval(30)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
    assert not manager.long_running_approved
    assert manager.request_long_running_approval(30) is True
    assert manager.long_running_approved
    assert manager.get_timeout(3600) is None
    assert 3500 < manager.effective_timeout(3600) <= 3600


@pytest.mark.parametrize("answer", ["no", "yes", 1, [True], ("no", "a test"), (1, "a test"), None, ()])
def test_only_true_approves(answer: object) -> None:
    manager = ExperimentTimeoutManager(approver=lambda minutes: answer)  # type: ignore[arg-type,return-value]
    assert manager.request_long_running_approval(30) is False
    assert manager.get_approval_metadata()["approved"] is False
    assert manager.get_timeout(3600) == 600


def test_threads_that_ask_at_once_are_answered_by_one_question() -> None:
    asked: list[float] = []
    first, second, go = threading.Event(), threading.Event(), threading.Event()

    def approver(minutes: float) -> bool:
        asked.append(minutes)
        (second if first.is_set() else first).set()
        return go.wait(10)

    manager = ExperimentTimeoutManager(approver=approver)
    answers: list[bool] = []

    def request() -> None:
        answers.append(manager.request_long_running_approval(30))

    threads = [threading.Thread(target=request) for _ in range(3)]
    threads[0].start()
    assert first.wait(10)
    for thread in threads[1:]:
        thread.start()
    assert not second.wait(0.3)
    go.set()
    for thread in threads:
        thread.join(10)
    assert answers == [True] * 3
    assert asked == [30]


def test_an_approver_that_fails_leaves_the_question_to_the_next() -> None:
    def approver(minutes: float) -> bool:
        raise RuntimeError("no answer")

    manager = ExperimentTimeoutManager(approver=approver)
    with pytest.raises(RuntimeError):
        manager.request_long_running_approval(30)
    manager.approver = yes
    assert copy.deepcopy(manager).request_long_running_approval(30) is True


async def async_no(minutes: float) -> bool:
    await asyncio.sleep(0)
    return False


async def async_yes(minutes: float) -> tuple[bool, str]:
    await asyncio.sleep(0)
    return True, "an async test"


@pytest.mark.filterwarnings("error")
def test_an_async_approver_cannot_answer_code_that_does_not_wait() -> None:
    manager = ExperimentTimeoutManager(approver=async_yes)
    with pytest.raises(TypeError, match="async with"):
        manager.request_long_running_approval(30)
    assert not manager.long_running_approved


def test_an_async_approver_is_awaited_and_asked_once() -> None:
    asked = []

    async def approver(minutes: float) -> tuple[bool, str]:
        asked.append(minutes)
        return await async_yes(minutes)

    async def main() -> None:
        refusing = ExperimentTimeoutManager(approver=async_no)
        assert await refusing.arequest_long_running_approval(30) is False
        with pytest.raises(ApprovalDeclined):
            async with refusing.experiment_context(3600):
                raise AssertionError("the body must not run")
        manager = ExperimentTimeoutManager(approver=approver)
        answers = await asyncio.gather(*(manager.arequest_long_running_approval(30) for _ in range(3)))
        assert answers == [True] * 3
        assert manager.get_approval_metadata()["granted_by"] == "an async test"

    asyncio.run(main())
    assert asked == [30]


def test_giving_up_the_wait_for_a_question_takes_it_from_nobody_else() -> None:
    async def main() -> None:
        asked, go = asyncio.Event(), asyncio.Event()

        async def approver(minutes: float) -> bool:
            asked.set()
            return await go.wait()

        manager = ExperimentTimeoutManager(approver=approver)
        first = asyncio.create_task(manager.arequest_long_running_approval(30))
        await asked.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.arequest_long_running_approval(30), 0.01)
        go.set()
        assert await first is True

    asyncio.run(main())


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -1, 0, True, "600", None, pytest.param(10**5000, id="huge")]
)
@pytest.mark.parametrize("name", ["default_timeout", "max_session_seconds"])
def test_a_cap_that_is_no_time_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        ExperimentTimeoutManager(**{name: bad})  # type: ignore[arg-type]


def test_every_kind_of_number_is_a_time() -> None:
    manager = ExperimentTimeoutManager(0.5, approver=yes)
    assert manager.get_timeout(3600) == 1, "no time at all would be no default"
    assert manager.request_long_running_approval(Fraction(61, 2)) is True  # type: ignore[arg-type]
    numpy = pytest.importorskip("numpy")
    assert manager.get_timeout(numpy.int64(3600)) is None
    assert ExperimentTimeoutManager(numpy.int64(60)).get_timeout(numpy.float32(5)) == 60


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, -1, True, "10", pytest.param(10**5000, id="huge")]
)
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

"""A command's parent: no process of a command outlives the call that ran it.

Started by its path in a bare interpreter, as the kernel's guardian is, and a subreaper like it:
``python -I -S command_guardian.py CHANNEL REQUESTER GRACE SECONDS COMMAND...``

What it says on the channel, one line each: ``started PID ITS_START GUARDIAN ITS_START``, ``failed ERRNO``,
``exited RETURNCODE`` when the command itself has ended, ``late`` when its time is up, and ``over`` when
nothing of it lives. It listens for ``terminate`` (SIGTERM, the grace, SIGKILL) and ``kill``; the end of the
channel, or of the requester, is a ``terminate`` too.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

if __name__ == "__main__":
    # At the end, so that nothing which lies there can stand in for the standard library.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from grd.execution.guardian import (
    HOPELESS_SECONDS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    Guard,
    descendants,
    prctl,
    send_signal,
    stat_of,
)

LOOK_SECONDS = 0.05
"""While an end is being made: what a process that was killed leaves is met again so soon."""

IDLE_SECONDS = 0.2
"""Where nothing wakes us when the requester ends (Linux < 5.3)."""

LONGEST_PAUSE_SECONDS = 3600.0
"""poll(2) takes no more than 24 days at once."""


def start_command(guard: Guard) -> int | OSError:
    """Fork and exec the command in a session of its own; its pid, or why it could not be executed."""
    guardian = os.getpid()
    told, tell = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError as error:
        return error
    if pid == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:
                os._exit(1)
            os.setsid()
            for signum in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(signum, signal.SIG_DFL)  # ignored by every Python, this one too
            os.execvpe(guard.command[0], guard.command, os.environ)
        except OSError as error:
            os.write(tell, str(error.errno or 0).encode())
        finally:
            os._exit(127)
    os.close(tell)
    failed = os.read(told, 64)
    os.close(told)
    if failed:
        os.waitpid(pid, 0)
        return OSError(int(failed), os.strerror(int(failed)))
    return pid


class Ending:
    """The end of everything below this process: SIGTERM once to each, SIGKILL when the grace is over."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.began: float | None = None
        self._asked: set[tuple[int, int]] = set()

    def begin(self, *, grace: float | None = None) -> None:
        """Begin now; a shorter ``grace`` counts also for an end that has begun."""
        if self.began is None:
            self.began = time.monotonic()
        if grace is not None:
            self.grace = grace

    def go_on(self, found: list[tuple[int, int]]) -> None:
        """Signal what was ``found`` alive, also what was forked since."""
        if self.began is None:
            return
        if time.monotonic() >= self.began + self.grace:
            for pid, start in found:
                send_signal(pid, start, signal.SIGKILL)
            return
        for process in found:
            if process not in self._asked:
                self._asked.add(process)
                send_signal(*process, signal.SIGTERM)
                send_signal(*process, signal.SIGCONT)  # one that is stopped hears of nothing else

    @property
    def hopeless(self) -> bool:
        """Whether something withstands SIGKILL: in an uninterruptible sleep, or of another user."""
        return self.began is not None and time.monotonic() > self.began + self.grace + HOPELESS_SECONDS


def pause(guard: Guard, channel: int, seconds: float | None) -> str | None:
    """Wait for a child's end, the requester's, or ``seconds``; what the requester said, None at its end."""
    poller = select.poll()
    handle = guard.requester_handle if guard.gone_at is None else -1
    for fd in (guard.wake, channel, handle):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    if guard.requester_handle < 0:
        seconds = min(IDLE_SECONDS, IDLE_SECONDS if seconds is None else seconds)
    longest = LONGEST_PAUSE_SECONDS if seconds is None else min(LONGEST_PAUSE_SECONDS, seconds)
    ready = {fd for fd, _ in poller.poll(longest * 1000)}
    if guard.wake in ready:
        try:
            os.read(guard.wake, 4096)
        except OSError:
            pass
    if channel not in ready:
        return ""
    try:
        return os.read(channel, 4096).decode() or None
    except OSError:
        return None


def guard_command(guard: Guard, seconds: float) -> None:
    """Start the command, end it when its time has come, then end what it left behind."""
    command = start_command(guard)
    if isinstance(command, OSError):
        guard.say(f"failed {command.errno}")
        return
    stat, own = stat_of(command), stat_of(os.getpid())
    started, own_start = (-1 if known is None else known[2] for known in (stat, own))
    guard.say(f"started {command} {started} {os.getpid()} {own_start}")
    late_at = time.monotonic() + seconds
    guard.let_go()
    os.dup2(1, 2)  # its output is the command's: nothing of ours may be in it
    ending = Ending(guard.grace)
    channel = guard.channel
    exited = late = False
    while True:
        guard.reap()
        guard.look_at_requester()
        if command in guard.children and not exited:
            exited = True
            guard.say(f"exited {guard.children[command]}")
            ending.begin()
        if not exited and not late and time.monotonic() >= late_at:
            late = True
            guard.say("late")
            ending.begin()
        if guard.gone_at is not None:
            ending.begin()
        found = descendants()
        if exited and (not found or ending.hopeless):
            guard.say("over")
            return
        ending.go_on(found)
        wait = LOOK_SECONDS if ending.began is not None else max(0.001, late_at - time.monotonic())
        said = pause(guard, channel, wait)
        if said is None:
            channel = -1
            ending.begin()
        elif "kill" in said:
            ending.begin(grace=0.0)
        elif said:
            ending.begin()


def main(arguments: list[str]) -> int:
    """Become the guardian of the command in ``arguments``."""
    channel, requester, grace, seconds, *command = arguments
    guard = Guard([channel, requester, grace, "-", "-", *command])
    os.set_inheritable(guard.channel, False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard.hear_signals()
    guard_command(guard, float(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The kernel's parent: no process of a kernel outlives the kernel, or whoever asked for it.

Started by its path in a bare interpreter, so that a kernel starts hardly later for it: the standard library
only, nothing of grd. ``python -I -S guardian.py CHANNEL REQUESTER GRACE DEADLINE CONNECTION_FILE COMMAND...``
CHANNEL is a descriptor; others may follow it with commas, which are only held: locks that the kernel must not
keep, and that must not be free before its end.

Two processes, both subreapers: the guardian is the kernel's parent and acts; its parent, the watcher, acts
where the guardian was killed or hangs. Whichever loses the other ends everything, and the kernel dies with
the guardian. Only whoever kills both, and the requester too, leaves something to the next look at the run.

What it says on the channel, one line each: ``started KERNEL ITS_START GUARDIAN ITS_START``,
``failed ERRNO`` and ``ended RETURNCODE WHY``; it listens for ``kill``.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

LATE_SECONDS = 1.0
"""The requester keeps the deadline itself; the guardian acts this much later, the watcher again as much."""

LAST_CALL_SECONDS = 5.0
POLITE_SECONDS = 0.5
"""What the children of a kernel that has ended have between SIGTERM and SIGKILL."""

PATIENCE_SECONDS = 1.0
"""How long the kernel's end is kept back until its descendants have ended too."""

HOPELESS_SECONDS = 20.0
POLL_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 3600.0
OOM_SCORE_RAISED_BY = 300
RUNNER_VARIABLE = b"GRD_RUNNER="  # contract.ENV_RUNNER

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

REQUESTER, DEADLINE, GUARDIAN, ASKED, EXIT = "requester", "deadline", "guardian", "asked", "exit"


def decide(
    now: float,
    *,
    grace: float,
    gone_at: float | None,
    deadline: float | None,
    requester_stopped: bool,
    catches_sigterm: bool,
    asked_at: float | None,
    interrupted: bool,
    late: float = LATE_SECONDS,
) -> str:
    """wait, terminate, interrupt or kill. Times are CLOCK_MONOTONIC seconds."""
    ends = [float("inf")]
    if deadline is not None:
        ends.append(deadline + grace + late)
    if gone_at is not None:
        ends.append(gone_at + grace if catches_sigterm or asked_at is not None else gone_at)
    if now >= min(ends):
        return "kill"
    overdue = deadline is not None and requester_stopped and now >= deadline + late
    if asked_at is None and (gone_at is not None or overdue):
        return "terminate" if catches_sigterm else "interrupt"
    last_call = min(ends) - min(LAST_CALL_SECONDS, grace / 2)
    return "interrupt" if asked_at is not None and not interrupted and now >= last_call else "wait"


# --- processes ------------------------------------------------------------------------------------------


def stat_of(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start (clock ticks since boot) of ``pid``; H: only its main thread has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name may hold spaces and brackets: the fields start after the last one.
            fields = file.read().rpartition(b")")[2].split()
        state = "H" if fields[0] == b"Z" and int(fields[17]) > 1 else fields[0].decode()
        return state, int(fields[1]), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def runner_of(pid: int) -> bytes:
    """The run whose runner ``pid`` stems from, as its environment says."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read().split(b"\0")
    except OSError:
        return b""
    return next((entry for entry in environment if entry.startswith(RUNNER_VARIABLE)), b"")


def descendants() -> list[tuple[int, int]]:
    """(pid, start) of every living process below this one.

    Spared is what a runner started from in here has made: a run in its own right with its own guardian.
    """
    below: dict[int, list[tuple[int, str, int]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = stat_of(int(name))
            if stat is not None:
                below.setdefault(stat[1], []).append((int(name), stat[0], stat[2]))
    own = runner_of(os.getpid())
    found: list[tuple[int, int]] = []
    waiting = list(below.get(os.getpid(), []))
    while waiting:
        pid, state, start = waiting.pop()
        if runner_of(pid) not in (b"", own):
            continue
        if state not in "ZX":
            found.append((pid, start))
        # Of the dead too: they were seen one after another, and a child may have been seen before its
        # parent died and left it to us.
        waiting.extend(below.get(pid, []))
    return found


def send_signal(pid: int, start: int, signum: int) -> None:
    """Signal the very process that started at ``start``: a pid may be somebody else's by now."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:
        handle = -1  # Linux < 5.3, or a container that forbids it
    try:
        stat = stat_of(pid)
        if stat is None or stat[2] != start:
            return
        if handle >= 0:
            signal.pidfd_send_signal(handle, signum)
        else:
            os.kill(pid, signum)
    except OSError:
        pass
    finally:
        if handle >= 0:
            os.close(handle)


def catches(pid: int, signum: int) -> bool:
    """Whether ``pid`` has a handler for ``signum``."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"SigCgt:"):
                    return bool(int(line.split()[1], 16) & (1 << (signum - 1)))
    except (OSError, ValueError, IndexError):
        pass
    return False


def prctl(option: int, value: int) -> None:
    """prctl(2); where it is forbidden the rest still holds."""
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


# --- the two processes ----------------------------------------------------------------------------------


class Guard:
    """What guardian and watcher have in common: the requester they watch and the end they make."""

    def __init__(self, arguments: list[str]) -> None:
        self.channel, *self.held = map(int, arguments[0].split(","))
        self.requester = int(arguments[1])
        self.grace = float(arguments[2])
        self.deadline = None if arguments[3] == "-" else float(arguments[3])
        self.connection_file = arguments[4]
        self.command = arguments[5:]
        self.gone_at: float | None = None
        self.children: dict[int, int] = {}
        stat = stat_of(self.requester)
        self.requester_start = stat[2] if stat is not None else None
        try:
            self.requester_handle = os.pidfd_open(self.requester)
        except OSError:
            self.requester_handle = -1
        self.wake = -1

    def hear_signals(self) -> None:
        """Survive what is sent to every process at once, and wake when a child ends.

        Handlers, not SIG_IGN: the kernel must find its signals as they were, and exec only resets handlers.
        """
        for signum in (*HELD_SIGNALS, signal.SIGCHLD):
            if signal.getsignal(signum) is not signal.SIG_IGN or signum == signal.SIGCHLD:
                signal.signal(signum, lambda number, frame: None)
        self.wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self.wake_write = write

    def let_go(self, *kept: int) -> None:
        """Keep no file of the kernel's open, and no folder in use."""
        kept_fds = {2, self.channel, self.requester_handle, self.wake, self.wake_write, *self.held, *kept}
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2 and fd not in kept_fds:
                try:
                    os.close(fd)
                except OSError:
                    pass
        os.chdir("/")

    def look_at_requester(self) -> bool:
        """Note when the requester has gone; returns whether it stands still (SIGSTOP)."""
        stat = stat_of(self.requester)
        here = stat is not None and stat[2] == self.requester_start and stat[0] not in "ZX"
        if not here and self.gone_at is None:
            self.gone_at = time.monotonic()
        return stat is not None and stat[0] in "Tt"

    def pause(self, *fds: int) -> set[int]:
        """Wait until something may have happened; the descriptors that are ready."""
        wanted = [fd for fd in fds if fd >= 0]
        timeout: float | None = POLL_SECONDS
        if self.gone_at is None and self.requester_handle >= 0:
            wanted.append(self.requester_handle)
            if self.deadline is not None:
                # poll(2) takes an int of milliseconds: 24 days
                timeout = min(max(POLL_SECONDS, self.deadline - time.monotonic()), LONGEST_PAUSE_SECONDS)
            else:
                timeout = None
        # poll, not select: a descriptor inherited from a busy server may be above 1023
        poller = select.poll()
        for fd in (self.wake, *wanted):
            poller.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000)}
        if self.wake in ready:
            try:
                os.read(self.wake, 4096)
            except OSError:
                pass
        return ready

    def reap(self) -> None:
        """Take the exit statuses of all children that ended, adopted ones too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.children[pid] = os.waitstatus_to_exitcode(status)

    def terminate_all(self, seconds: float) -> None:
        """SIGTERM to every descendant, and the time to follow it."""
        for pid, start in descendants():
            send_signal(pid, start, signal.SIGTERM)
        give_up = time.monotonic() + seconds
        while descendants() and time.monotonic() < give_up:
            self.reap()
            time.sleep(0.01)

    def end_all(self, seconds: float) -> None:
        """SIGKILL to every descendant, again and again: they may fork meanwhile."""
        give_up = time.monotonic() + seconds
        while True:
            found = descendants()
            for pid, start in found:
                send_signal(pid, start, signal.SIGKILL)
            self.reap()
            if not found or time.monotonic() >= give_up:
                return
            time.sleep(0.005)

    def say(self, line: str) -> None:
        """Tell the requester, if it is there."""
        try:
            os.write(self.channel, line.encode() + b"\n")
        except OSError:
            pass

    def finish(self, report: str | None) -> None:
        """Report, see to the rest, and leave no connection file where nobody else will remove it."""
        if report is not None:
            self.say(report)
        self.end_all(HOPELESS_SECONDS)
        self.look_at_requester()
        if self.gone_at is not None and self.connection_file != "-":
            try:
                os.unlink(self.connection_file)
            except OSError:
                pass


def start_kernel(guard: Guard) -> int | OSError:
    """Fork and exec the kernel; its pid, or why it could not be executed."""
    guardian = os.getpid()
    told, tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:
                os._exit(1)
            os.setsid()
            for signum in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(signum, signal.SIG_DFL)  # ignored by every Python, this one too
            try:
                with open("/proc/self/oom_score_adj") as file:
                    score = int(file.read()) + OOM_SCORE_RAISED_BY
                with open("/proc/self/oom_score_adj", "w") as file:
                    file.write(str(min(1000, score)))
            except (OSError, ValueError):
                pass
            # ipykernel's own watch over its parent is off unless this is its parent's pid
            os.environ["JPY_PARENT_PID"] = str(guardian)
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


def guard_kernel(guard: Guard, watcher: int) -> None:
    """The guardian: start the kernel, end it when its time has come, then end what it left behind.

    ``watcher`` is the end of a pipe that closes with the watcher's death.
    """
    kernel = start_kernel(guard)
    if isinstance(kernel, OSError):
        guard.say(f"failed {kernel.errno}")
        return
    stat, own = stat_of(kernel), stat_of(os.getpid())
    start = stat[2] if stat is not None else -1
    guard.say(f"started {kernel} {start} {os.getpid()} {own[2] if own is not None else -1}")
    guard.let_go(watcher)
    why: str | None = None
    channel = guard.channel
    asked_at: float | None = None
    interrupted = False
    while why is None:
        ready = guard.pause(channel, watcher)
        guard.reap()
        stopped = guard.look_at_requester()
        if kernel in guard.children:
            why = EXIT if asked_at is None or guard.gone_at is not None else DEADLINE
        elif watcher in ready and guard.gone_at is None:
            why = GUARDIAN
        elif channel in ready:
            said = _read(channel)
            if b"kill" in said:
                why = ASKED
            elif not said:
                channel = (
                    -1
                )  # nobody will say anything any more; whether the requester lives is seen elsewhere
        if watcher in ready:
            watcher = -1
        if why is not None:
            break
        now = time.monotonic()
        action = decide(
            now,
            grace=guard.grace,
            gone_at=guard.gone_at,
            deadline=guard.deadline,
            requester_stopped=stopped,
            catches_sigterm=catches(kernel, signal.SIGTERM),
            asked_at=asked_at,
            interrupted=interrupted,
        )
        if action == "kill":
            why = REQUESTER if guard.gone_at is not None else DEADLINE
        elif action == "terminate":
            asked_at = now
            os.kill(kernel, signal.SIGTERM)  # our own child, not yet waited for: the pid is its own
        elif action == "interrupt":
            asked_at, interrupted = asked_at or now, True
            os.kill(kernel, signal.SIGINT)
    if why == EXIT:
        guard.terminate_all(POLITE_SECONDS)
    guard.end_all(PATIENCE_SECONDS)
    guard.finish(f"ended {guard.children.get(kernel, -signal.SIGKILL)} {why}")


def watch_guardian(guard: Guard, guardian: int, held: int) -> None:
    """The watcher: act where the guardian cannot. ``held`` is its end of the guardian's pipe."""
    guard.let_go(held)
    while guardian not in guard.children:
        guard.pause()
        guard.reap()
        guard.look_at_requester()
        action = decide(
            time.monotonic() - LATE_SECONDS,
            grace=guard.grace,
            gone_at=guard.gone_at,
            deadline=guard.deadline,
            requester_stopped=False,
            catches_sigterm=True,
            asked_at=0.0,
            interrupted=True,
        )
        if action == "kill":
            break
    killed = guard.children.get(guardian) != 0
    guard.end_all(PATIENCE_SECONDS)
    guard.finish(f"ended {-signal.SIGKILL} {GUARDIAN}" if killed else None)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


def main(arguments: list[str]) -> int:
    """Become watcher and guardian of the kernel in ``arguments``."""
    guard = Guard(arguments)
    for fd in (guard.channel, *guard.held):
        os.set_inheritable(fd, False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    closes_with_watcher, held = os.pipe2(os.O_CLOEXEC)
    guardian = os.fork()
    if guardian == 0:
        os.close(held)
        guard.hear_signals()
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # fork does not pass it on
        guard_kernel(guard, closes_with_watcher)
        return 0
    os.close(closes_with_watcher)
    guard.hear_signals()
    watch_guardian(guard, guardian, held)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

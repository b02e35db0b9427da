"""Every process that grd starts has a deadline, or stands here with the reason why it has none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grd

PACKAGE = Path(grd.__file__).parent

STARTED_AND_NOT_WAITED_FOR = {
    "execution/launch.py": "a runner keeps its own deadline; retrier and coordinator end with their runs",
    "execution/runner.py": "--on-end: the user's own command, after the run; nobody waits for it",
    "execution/runner_template.py": "ends with the coordinator that it starts runners for",
    "execution/guarded_kernel.py": "the guardian ends the kernel at its deadline",
    "execution/command_process.py": "run_with_timeout: the guardian, or `look`, keeps the limit",
    "experiment/distributed.py": "part of its cell: the guardian ends it with the kernel, at its deadline",
    "hardware/facts.py": "waited for with communicate(timeout=...)",
    "tracking/mlflow/follower.py": "it ends itself, a minute after the run at the latest",
}
WAITED_FOR_WITHOUT_LIMIT = {
    "steps/run.py": "the runner keeps the deadline of its run itself; a thread waits, and nobody for that",
}
STARTERS = {"Popen", "launch_kernel"}
WAITERS = {"run", "call", "check_call", "check_output", "communicate"}
FORBIDDEN = {"getoutput", "getstatusoutput", "system", "popen", "spawnl", "spawnv", "posix_spawn", "forkpty"}


def calls(source: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call: the text before its last dot, the name after it, and the call."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr, node
        elif isinstance(node.func, ast.Name):
            yield "", node.func.id, node


def without_deadline(name: str, source: str) -> list[str]:
    """Calls in a file that start a process, or wait for one, and have no limit."""
    found = []
    for owner, function, call in calls(source):
        limited = any(keyword.arg == "timeout" for keyword in call.keywords)
        waits_for_a_process = function in WAITERS and (owner == "subprocess" or function == "communicate")
        unlimited = bool(
            (waits_for_a_process and not limited)
            # of processes, threads' events and conditions alike
            or (
                function == "wait"
                and owner
                and not call.args
                and not limited
                and name not in WAITED_FOR_WITHOUT_LIMIT
            )
            or (function in FORBIDDEN and owner in ("os", "subprocess"))
            or (function in STARTERS and owner != "super()" and name not in STARTED_AND_NOT_WAITED_FOR)
        )
        if unlimited:
            found.append(f"{name}:{call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_every_child_process_has_a_deadline_or_an_agreed_reason() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert len(files) > 50
    assert [line for name, source in sorted(files.items()) for line in without_deadline(name, source)] == []
    for name in STARTED_AND_NOT_WAITED_FOR:
        assert any(function in STARTERS for _, function, _ in calls(files[name])), name


def test_the_check_for_deadlines_can_fail() -> None:
    for bad in (
        "subprocess.run(['git'])",
        "subprocess.check_output(['git'], text=True)",
        "process.communicate()",
        "process.wait()",
        "os.system('git')",
        "subprocess.Popen(['git'])",
    ):
        assert without_deadline("some.py", bad), bad
    assert not without_deadline("some.py", "subprocess.run(['git'], timeout=5)\nprocess.wait(2)")

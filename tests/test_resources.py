"""What a run used: the true peak of its memory with all its processes, processor time, GPUs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, wait_until

import grd
from grd.hardware.monitor import GPUStats
from grd.interfaces.cli.rendering import resources_text
from grd.runs import resource_samples
from grd.tracking import cgroup_use, gpu_use, sampler, tree_walk
from grd.tracking.gpu_use import GpuUse
from grd.tracking.peaks import AT_LEAST, ONE_PROCESS, TREE, TREE_AND_SPIKE, Accumulator
from grd.tracking.tree_walk import ProcessUse, SharedCount, TreeLook

MB = 1_000_000

MEASURE = """
import os, subprocess, sys, time

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

def shared_out(*pids):
    \"\"\"Page by page: PSS, but of each file the most that one of them has: others may have it too.\"\"\"
    if len(pids) == 1:
        return resident()
    total, files = 0, {}
    for pid in pids:
        for line in open(f'/proc/{pid}/smaps'):
            words = line.split()
            if '-' in words[0]:
                place = words[0] if len(words) < 6 else words[5]
                rss = pss = anonymous = 0
            elif words[0] == 'Rss:':
                rss = int(words[1]) * 1024
            elif words[0] == 'Pss:':
                pss = int(words[1]) * 1024
            elif words[0] == 'Anonymous:':
                if place.startswith('/') and int(words[1]) == 0:
                    of_this = files.setdefault(place, {})
                    of_this[pid] = of_this.get(pid, 0) + rss
                else:
                    total += pss
    return max(total + sum(max(each.values()) for each in files.values()), resident())

def memory(megabytes):
    block = bytearray(megabytes * 1_000_000)
    block[::4096] = b'x' * len(block[::4096])
    return block

def tell(truth):
    print('TRUTH', truth, flush=True)

base = resident()
"""
HOLDS = "block = memory(500); tell(shared_out(os.getpid())); time.sleep(2); del block"
SPIKE = "block = memory(500); tell(base + 500_000_000); time.sleep(0.05); del block; time.sleep(1)"
CHILD = """
code = "b = bytearray(500_000_000); b[::4096] = b'x' * len(b[::4096]); print(1, flush=True); input()"
child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
tell(shared_out(os.getpid(), child.pid))
time.sleep(1.5)
child.communicate(b'\\n')
"""
AFTER_A_BIGGER_ONE = """
block = memory(800); tell(shared_out(os.getpid())); del block
block = memory(500); time.sleep(1)
"""
FORKS = """
block = memory(500)
pids = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        time.sleep(2)
        os._exit(0)
    pids.append(pid)
time.sleep(0.5)
tell(shared_out(os.getpid(), *pids))
for pid in pids:
    os.waitpid(pid, 0)
"""
IDLE_CHILD = """
code = "b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096]); print(1, flush=True); input()"
child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
before = shared_out(os.getpid(), child.pid)
time.sleep(1)
block = memory(500); tell(before + 500_000_000); time.sleep(0.05); del block
time.sleep(1)
child.communicate(b'\\n')
"""
SPIKE_OF_A_CHILD = """
block = memory(300)
code = (
    "import time; b = bytearray(400_000_000); b[::4096] = b'x' * len(b[::4096]); time.sleep(0.03); del b; "
    "print(1, flush=True); input()"
)
child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
tell(shared_out(os.getpid(), child.pid) + 400_000_000)
time.sleep(1)
child.communicate(b'\\n')
"""
A_FORK_THAT_DROPS_IT = """
block = memory(500)
time.sleep(1)
pid = os.fork()
if pid == 0:
    del block
    time.sleep(1.5)
    os._exit(0)
time.sleep(0.7)
tell(shared_out(os.getpid(), pid))
os.waitpid(pid, 0)
"""
TASKS = {
    "holds 2 s": HOLDS, "spike of 50 ms": SPIKE, "in a child": CHILD,
    "after a bigger one": AFTER_A_BIGGER_ONE, "four forks": FORKS,
    "spike beside an idle child": IDLE_CHILD, "spike of a child": SPIKE_OF_A_CHILD,
    "a fork that drops it": A_FORK_THAT_DROPS_IT,
}  # fmt: skip


def used(record: dict[str, Any]) -> dict[str, Any]:
    found = record["attempts"][-1]["resources"]
    assert isinstance(found, dict)
    return found


def truth(project: Project, run: str) -> float:
    told = [line for line in project.grd("logs", run).out.splitlines() if line.startswith("TRUTH")]
    return max(float(line.split()[1]) for line in told)


def is_true(peak: float, wanted: float) -> bool:
    return abs(peak - wanted) <= max(0.02 * wanted, 5 * MB)


@pytest.mark.parametrize("task", TASKS)
def test_the_peak_is_the_true_one(task: str, project: Project) -> None:
    project.notebook("run.ipynb", MEASURE, TASKS[task])
    done = project.grd("research", "run.ipynb", "--json")
    assert done.code == 0, done.err
    found, wanted = used(done.json), truth(project, "last")
    assert is_true(found["peak_memory_bytes"], wanted), (found, wanted)
    if "fork" not in task:  # whichever is more
        # a busy machine may draw out a spike until it is sampled
        of_several = (TREE,) if task == "in a child" else (TREE, TREE_AND_SPIKE)
        assert found["peak_source"] in (of_several if "child" in task else (ONE_PROCESS,))
    shown = project.grd("status", "last").out
    assert "peak memory" in shown and "cores on average" in shown


@pytest.mark.faults
def test_runs_side_by_side_do_not_count_each_others_memory(project: Project) -> None:
    project.notebook("big.ipynb", MEASURE, HOLDS)
    project.notebook("forks.ipynb", MEASURE, FORKS)
    for name in ("big", "forks"):
        assert project.grd("research", f"{name}.ipynb", "--detach").code == 0
    for name in ("big", "forks"):
        (run,) = (r["run_id"] for r in project.grd("list", "--json").json["runs"] if name in r["run_id"])
        assert project.grd("wait", run).code == 0
        found = used(project.grd("status", run, "--json").json)
        assert is_true(found["peak_memory_bytes"], truth(project, run)), (name, found)


WORKS = """
import multiprocessing, os, subprocess, sys, time

def burn(seconds):
    give_up = time.process_time() + seconds
    while time.process_time() < give_up:
        pass

burn(1.0)
burning = "import time\\nwhile time.process_time() < 1.0: pass"
subprocess.run([sys.executable, '-c', burning])
pid = os.fork()
if pid == 0:
    if os.fork() == 0:  # nobody of ours waits for this one
        os.setsid()
        burn(1.0)
        open('orphan-done', 'w').close()
    os._exit(0)
os.waitpid(pid, 0)
while not os.path.exists('orphan-done'):
    time.sleep(0.05)
with open('written', 'wb') as file:
    file.write(bytes(20_000_000))
    os.fsync(file.fileno())
time.sleep(1.2)
"""


def test_processor_time_is_that_of_all_also_of_those_that_have_ended(project: Project) -> None:
    project.notebook("run.ipynb", WORKS)
    done = project.grd("research", "run.ipynb", "--json")
    assert done.code == 0, done.err
    found = used(done.json)
    assert 3.0 <= found["cpu_seconds"] <= 6.0, (
        found
    )  # three seconds, and what a kernel and Python need to start
    assert found["written_bytes"] is None or found["written_bytes"] >= 20_000_000
    assert found["most_processes"] >= 2
    assert 0 < found["mean_cores"] < os.cpu_count()  # type: ignore[operator]


UNWAITED = """
import os, signal, time

def burn(seconds):
    give_up = time.process_time() + seconds
    while time.process_time() < give_up:
        pass

def child():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        burn(1.5)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)  # it has ended

child()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
child()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
burn(2.0)
"""


def test_processor_time_of_children_that_nobody_waits_for_is_not_lost(project: Project) -> None:
    project.notebook("run.ipynb", UNWAITED)
    done = project.grd("research", "run.ipynb", "--json")
    assert done.code == 0, done.err
    found = used(done.json)
    assert 4.5 <= found["cpu_seconds"] <= 7.5, found


WAITS = "import time\nprint('here', flush=True)\ntime.sleep(600)"


def test_samples_are_live_and_a_killed_runner_loses_one_at_most(project: Project) -> None:
    project.notebook("run.ipynb", WAITS)
    assert project.grd("research", "run.ipynb", "--detach", "--grace", "1s").code == 0
    project.wait_for_output("here")
    samples = project.only_run() / "attempts" / "1" / "resources.jsonl"
    wait_until(lambda: samples.exists() and len(samples.read_text().splitlines()) >= 4, "some samples")
    live = project.grd("status", "last", "--json").json["resources"]
    assert live["rss_bytes"] > 10 * MB and live["processes"] == 1
    assert "resources   memory" in project.grd("status", "last").out
    os.kill(project.record()["runner"]["pid"], signal.SIGKILL)
    killed = time.time()
    assert project.grd("wait", "last").code == 75
    found = used(project.grd("status", "last", "--json").json)
    assert found["complete"] is False and found["peak_memory_bytes"] > 10 * MB
    last = json.loads(samples.read_text().splitlines()[-1])
    assert killed - last["t"] < 10.0  # a line a second, on a machine that may be busy
    first = json.loads(samples.read_text().splitlines()[0])
    assert first["seconds"] < 10.0


def test_where_nothing_can_be_sampled_the_record_says_null(project: Project, tmp_path: Path) -> None:
    """As on a system without /proc: every Python of the run is told that it lies elsewhere."""
    (tmp_path / "sitecustomize.py").write_text(
        "from grd.tracking import tree_walk\ntree_walk.PROC = '/nowhere'"
    )
    paths = [str(tmp_path), str(Path(grd.__file__).parents[1])]
    project.environment["PYTHONPATH"] = os.pathsep.join(paths)
    project.notebook("run.ipynb", "print('here')")
    done = project.grd("research", "run.ipynb", "--json")
    assert (done.code, done.json["attempts"][0]["resources"]) == (0, None), done.err
    assert not (project.only_run() / "attempts" / "1" / "resources.jsonl").exists()
    assert "resources" not in project.grd("status", "last").out


def test_a_look_that_hangs_in_a_driver_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "TURN_SECONDS", 0.2)
    reached, opened = threading.Event(), threading.Event()

    def hang(**_: Any) -> Any:
        reached.set()
        opened.wait(60)
        raise OSError("the driver is gone")

    sampling = sampler.ResourceSampler(tmp_path / "resources.jsonl")
    sampling.watch({"kernel": {"pid": os.getpid()}})
    monkeypatch.setattr(sampler, "get_gpu_monitor", hang)
    sampling._next_gpu = 0.0
    sampling.start()
    assert reached.wait(60)
    sampling.watch({})
    sampling.close()
    found = sampling.summary()
    assert not opened.is_set() and found is not None and found["peak_memory_bytes"] > MB
    opened.set()


# --- what is made of what was seen --------------------------------------------------------------------------


def look(**processes: ProcessUse) -> TreeLook:
    return TreeLook({int(name.removeprefix("p")): process for name, process in processes.items()})


def process(
    rss: int, mark: int = 0, *, cpu: float = 0.0, waited: float = 0.0, written: int | None = None, **more: Any
) -> Any:
    read = None if written is None else 0
    return ProcessUse(1, rss, max(mark, rss), cpu, waited, 1, read, written, **more)


def counted(once: int, unsure: int = 0) -> SharedCount:
    return SharedCount(once, once, unsure)


def test_of_one_process_the_kernels_own_mark_is_the_peak() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(100, 900)))
    assert (seen.totals.peak_bytes, seen.totals.peak_source) == (900, ONE_PROCESS)


def test_a_spike_of_one_comes_on_top_of_what_the_others_have() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(100 * MB), p2=process(50 * MB)), counted(150 * MB))
    seen.take(look(p1=process(100 * MB, 300 * MB), p2=process(50 * MB)), counted(150 * MB))
    assert (seen.totals.peak_bytes, seen.totals.peak_source) == (350 * MB, TREE_AND_SPIKE)
    seen.take(look(p1=process(100 * MB, 300 * MB), p2=process(250 * MB)), counted(350 * MB))
    assert seen.totals.peak_bytes == 350 * MB, "an old spike is not added again"


def test_the_spike_of_a_small_one_is_told_though_the_tree_seems_no_larger() -> None:
    seen = Accumulator()
    small = look(p1=process(400 * MB), p2=process(20 * MB))
    assert seen.wants_shared(small)
    seen.take(small, counted(420 * MB))
    seen.take(look(p1=process(400 * MB), p2=process(20 * MB, 420 * MB)))
    assert (seen.totals.peak_bytes, seen.totals.peak_source) == (820 * MB, TREE_AND_SPIKE)


def test_a_mark_that_is_told_a_little_lower_is_no_spike_of_all_that_was_given_back() -> None:
    """As Linux told it of a process that held 500 MB and ended: the same mark, 0.02 % lower."""
    seen = Accumulator()
    seen.take(look(p1=process(54_296_576), p2=process(509_145_088)), counted(541_787_136))
    seen.take(look(p1=process(54_296_576), p2=process(9_142_272, 509_038_592)), counted(42_419_200))
    seen.take(look(p1=process(54_296_576), p2=process(9_142_272, 509_145_088)), counted(42_419_200))
    assert (seen.totals.peak_bytes, seen.totals.peak_source) == (541_787_136, TREE)


def test_of_several_spikes_the_largest_was_surely_and_that_is_said() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(100 * MB), p2=process(50 * MB)), counted(150 * MB))
    seen.take(look(p1=process(100 * MB, 300 * MB), p2=process(50 * MB, 150 * MB)))
    assert (seen.totals.peak_bytes, seen.totals.peak_source) == (350 * MB, AT_LEAST)


def test_what_forks_share_is_no_spike_whoever_gives_it_back() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(540 * MB)))
    fork = process(40 * MB, 540 * MB, parent=1, forked=True)
    seen.take(look(p1=process(540 * MB), p2=fork), counted(540 * MB))
    assert seen.totals.peak_bytes == 540 * MB, "what it gave back its parent has"
    keeps = process(540 * MB, parent=1, forked=True)
    seen.take(look(p1=process(540 * MB), p2=fork, p3=keeps), counted(540 * MB))
    drops = process(40 * MB, 550 * MB, parent=1, forked=True)
    seen.take(look(p1=process(540 * MB), p2=fork, p3=drops), counted(540 * MB))
    assert seen.totals.peak_bytes == 550 * MB, "it had 10 MB more, and then gave back all"
    keeps = process(540 * MB, 550 * MB, parent=1, forked=True)
    seen.take(look(p1=process(40 * MB, 560 * MB), p3=keeps), counted(540 * MB))
    assert seen.totals.peak_bytes == 560 * MB, "the fork still has what its parent gave back"
    orphan = process(40 * MB, 540 * MB, parent=77, forked=True)
    seen.take(look(p1=process(40 * MB, 560 * MB), p3=keeps, p4=orphan), counted(540 * MB))
    assert seen.totals.peak_bytes == 560 * MB


def test_the_spike_of_a_fork_above_what_it_inherited_counts() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(100 * MB)))
    fork = process(100 * MB, 400 * MB, parent=1, forked=True)
    seen.take(look(p1=process(100 * MB), p2=fork), counted(100 * MB))
    assert seen.totals.peak_bytes == 400 * MB
    worker = process(60 * MB, parent=1, forked=True)
    seen.take(look(p1=process(100 * MB), p3=worker), counted(120 * MB))
    worker = process(60 * MB, 460 * MB, parent=1, forked=True)
    seen.take(look(p1=process(100 * MB), p3=worker), counted(120 * MB))
    assert seen.totals.peak_bytes == 520 * MB


def test_shared_pages_are_counted_when_they_may_tell_a_new_peak() -> None:
    seen = Accumulator()
    seen.begin_tree(frozenset({9}))
    alone = look(p1=process(500 * MB), p9=process(20 * MB))
    assert not seen.wants_shared(alone), "one process, and its keeper"
    seen.take(alone)
    forked = look(p1=process(500 * MB), p2=process(400 * MB), p9=process(20 * MB))
    assert seen.wants_shared(forked)
    seen.take(forked, counted(501 * MB))
    assert not seen.wants_shared(forked)
    assert seen.totals.peak_bytes == 501 * MB
    alone = look(p1=process(500 * MB), p3=process(200 * MB), p9=process(20 * MB))
    assert not seen.wants_shared(alone), "it seemed larger when it was counted, and was not"
    assert seen.wants_shared(alone, affordable=True)


ROLLUP = """55d0c1a00000-7ffd1a3f2000 ---p 00000000 00:00 0    [rollup]
Rss: {rss} kB
Pss: {pss} kB
Pss_Anon: {anon} kB
Pss_File: {files} kB
Pss_Shmem: {shared} kB
Anonymous: {anonymous} kB
"""


def counted_by_linux(
    root: Path, monkeypatch: pytest.MonkeyPatch, processes: dict[int, ProcessUse], **kib: dict[str, int]
) -> SharedCount:
    """What is made of these figures in KiB, as the system tells them (proc(5))."""
    for name, told in kib.items():
        folder = root / name.removeprefix("p")
        folder.mkdir()
        pss = told["anon"] + told["files"] + told["shared"]
        (folder / "smaps_rollup").write_text(ROLLUP.format(pss=pss, **{"anonymous": told["anon"], **told}))
        (folder / "status").write_text(
            f"RssFile: {told['rss_files']} kB\nRssShmem: {told['rss_shared']} kB\n"
        )
    monkeypatch.setattr(tree_walk, "PROC", str(root))
    found = tree_walk.count_shared(processes)
    assert found is not None
    return found


def test_libraries_that_others_have_too_count_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSS has a third of them for each: a process outside the tree has them, too."""
    kernel = {"rss": 360, "anon": 60, "files": 100, "shared": 0, "rss_files": 300, "rss_shared": 0}
    child = {"rss": 140, "anon": 90, "files": 17, "shared": 0, "rss_files": 50, "rss_shared": 0}
    found = counted_by_linux(tmp_path, monkeypatch, {1: process(0), 2: process(0)}, p1=kernel, p2=child)
    assert found == SharedCount(pss=267 * 1024, once=(60 + 90 + 300) * 1024)


def test_what_comes_to_be_shared_while_it_is_counted_is_no_peak_but_may_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 of shared memory, which the first had alone when it was counted; the second then had 200 of it."""
    first = {"rss": 350, "anon": 40, "files": 10, "shared": 300, "rss_files": 10, "rss_shared": 300}
    second = {"rss": 230, "anon": 20, "files": 0, "shared": 100, "rss_files": 10, "rss_shared": 110}
    found = counted_by_linux(tmp_path, monkeypatch, {1: process(0), 2: process(0)}, p1=first, p2=second)
    assert (found.once, found.unsure) == ((60 + 320) * 1024, 90 * 1024)
    seen = Accumulator()
    tree = look(p1=process(350 * MB), p2=process(230 * MB))
    seen.take(tree, counted(380 * MB, unsure=90 * MB))
    assert seen.totals.peak_bytes == 380 * MB
    assert seen.wants_shared(tree), "it may have had more: that is to be counted again"


def test_a_child_that_has_its_parents_memory_until_its_exec_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = {"rss": 500, "anon": 460, "files": 40, "shared": 0, "rss_files": 40, "rss_shared": 0}
    tree = {1: process(0), 2: process(0, parent=1, forked=True)}
    found = counted_by_linux(tmp_path, monkeypatch, tree, p1=parent, p2=parent)
    assert found.once == 500 * 1024


def test_of_one_that_ends_its_libraries_are_not_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = {"rss": 360 << 10, "anon": 60 << 10, "files": 300 << 10, "shared": 0, "rss_files": 300 << 10}
    tree = {1: process(360 << 20), 2: process(700 << 20, shareable=280 << 20)}
    gone_meanwhile = counted_by_linux(tmp_path, monkeypatch, tree, p1={**kernel, "rss_shared": 0})
    seen = Accumulator()
    seen.take(TreeLook(tree), gone_meanwhile)
    assert seen.totals.peak_bytes == (360 + 700 - 280) << 20
    seen = Accumulator()
    seen.take(look(p1=process(360 << 20), p2=process(300 << 20, shareable=280 << 20)), counted(380 << 20))
    seen.take(look(p1=process(360 << 20), p2=process(10 << 20, 700 << 20, shareable=5 << 20)))
    assert seen.totals.peak_bytes <= (360 + 700 - 280) << 20


def test_processor_time_never_falls_and_goes_on_in_the_next_tree() -> None:
    seen = Accumulator()
    seen.begin_tree(frozenset({9}))
    seen.take(look(p1=process(1, cpu=2.0), p2=process(1, cpu=3.0), p9=process(1, cpu=50.0)))
    assert seen.totals.cpu_seconds == 5.0
    seen.take(look(p1=process(1, cpu=2.0), p9=process(1, cpu=51.0)))
    assert seen.totals.cpu_seconds == 5.0, "nobody has waited for it yet"
    seen.take(look(p1=process(1, cpu=2.0), p9=process(1, cpu=51.0, waited=3.0)))
    assert seen.totals.cpu_seconds == 5.0
    seen.begin_tree(frozenset({19}))
    seen.take(look(p11=process(1, cpu=1.0, written=7), p19=process(1)))
    assert (seen.totals.cpu_seconds, seen.totals.written_bytes) == (6.0, 7)


def test_the_time_of_zombies_counts_once() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(1, cpu=1.0), p2=process(1, cpu=2.0)))
    ended = TreeLook({1: process(1, cpu=1.5)}, {2: process(0, cpu=3.0, ended=True)})
    seen.take(ended)
    assert (seen.totals.cpu_seconds, seen.totals.processes) == (4.5, 1)
    seen.take(look(p1=process(1, cpu=1.5, waited=3.0)))
    assert seen.totals.cpu_seconds == 4.5
    seen.take(look(p1=process(1, cpu=2.0, waited=3.0)))
    assert seen.totals.cpu_seconds == 5.0


def test_the_time_of_one_that_nobody_waits_for_stays_and_hides_nothing_later() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(1, cpu=1.0), p2=process(1, cpu=3.0)))
    for second in range(5):
        seen.take(look(p1=process(1, cpu=1.0 + second)))
    assert seen.totals.cpu_seconds == 8.0
    seen.take(look(p1=process(1, cpu=5.0), p3=process(1, cpu=2.0)))
    seen.take(look(p1=process(1, cpu=5.0, waited=2.5)))
    assert seen.totals.cpu_seconds == 10.5, "the third was waited for"


def test_time_that_is_waited_for_in_a_chain_counts_once() -> None:
    seen = Accumulator()
    seen.take(look(p1=process(1, cpu=1.0), p2=process(1, cpu=1.0), p3=process(1, cpu=4.0)))
    seen.take(look(p1=process(1, cpu=1.0, waited=5.0)))
    seen.take(look(p1=process(1, cpu=2.0, waited=5.0)))
    assert seen.totals.cpu_seconds == 7.0


def test_a_torn_last_sample_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    assert resource_samples.newest(path) is None
    lines = [json.dumps({"t": n, "seconds": n, "padding": "x" * 3000, "gpu_now": []}) for n in range(40)]
    path.write_text("\n".join(lines) + '\n{"t": 99')
    found = resource_samples.newest(path)
    assert found is not None and found["t"] == 39
    assert resource_samples.of_lost_attempt(path) == {"seconds": 39, "padding": "x" * 3000, "complete": False}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None, None)),
        ({"memory.current": "10", "memory.peak": "20", "cpu.stat": "nr_throttled 1\nthrottled_usec 2500000"},
         (10, 20, 2.5)),
        ({"memory.current": "10", "cpu.stat": "usage_usec 5"}, (10, None, None)),
        ({"memory.usage_in_bytes": "7", "memory.max_usage_in_bytes": "9", "cpu.stat": "throttled_time 10"},
         (7, 9, 1e-8)),
        ({"memory.current": "much", "memory.peak": "", "cpu.stat": "throttled_usec"}, (None, None, None)),
    ],
)  # fmt: skip
def test_what_a_cgroup_tells_and_does_not_tell(
    tmp_path: Path, files: dict[str, str], expected: tuple[Any, ...]
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    for name, text in files.items():
        (group / name).write_text(text + "\n")
    found = cgroup_use.look(cgroup_use.Group("/group", ("/group",)), tmp_path)
    assert (found.memory_bytes, found.peak_bytes, found.throttled_seconds) == expected


@pytest.mark.parametrize(
    ("mounts", "group", "files", "expected"),
    [
        pytest.param(
            "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/pod/c\n",
            {"pod/cpu.stat": "throttled_usec 5000000", "pod/c/cpu.stat": "throttled_usec 250000",
             "pod/c/memory.current": "5", "cpu.stat": "usage_usec 9"},
            ("/sys/fs/cgroup/pod/c", 5, 5.25), id="v2, the quota of the pod",
        ),
        pytest.param(
            "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "32 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
            "5:memory:/j\n4:cpu,cpuacct:/k/l\n",
            {"memory/j/memory.usage_in_bytes": "5", "cpu,cpuacct/k/cpu.stat": "throttled_time 3000000000",
             "cpu,cpuacct/k/l/cpu.stat": "nr_throttled 3\nthrottled_time 0"},
            ("/sys/fs/cgroup/memory/j", 5, 3.0), id="v1",
        ),
        pytest.param(
            "32 24 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "4:cpu:/k\n",
            {"cpu/k/cpu.stat": "throttled_time 1000000000"}, (None, None, 1.0), id="v1, none for memory",
        ),
    ],
)  # fmt: skip
def test_a_process_is_held_back_by_any_level_of_its_cgroup(
    tmp_path: Path, mounts: str, group: str, files: dict[str, str], expected: tuple[Any, ...]
) -> None:
    texts = {"proc/self/mountinfo": mounts, "proc/7/cgroup": group}
    texts |= {f"sys/fs/cgroup/{name}": text + "\n" for name, text in files.items()}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    place = cgroup_use.find(7, tmp_path)
    assert place is not None
    found = cgroup_use.look(place, tmp_path)
    assert (found.folder, found.memory_bytes, found.throttled_seconds) == expected
    assert cgroup_use.find(8, tmp_path) is None


def test_rates_stand_beside_what_a_gpu_did_and_the_difference_is_said(project: Project) -> None:
    """The GPU is put into the record afterwards: there may be none here."""
    cell = (
        "import time\nfrom grd.experiment import training\n"
        "for epoch in training.epochs(2, checkpoint_dir='', resume=False):\n"
        "    for batch in epoch.steps([1, 2, 3]): time.sleep(0.1)"
    )
    project.notebook("run.ipynb", cell)
    assert project.grd("research", "run.ipynb").code == 0
    plain = project.grd("status", "last").out
    assert "steps/s" in plain and "GPU" not in plain and "gpu " not in plain
    path = project.only_run() / "run.json"
    record = json.loads(path.read_text())
    gpu = {"uuid": "GPU-1", "name": "NVIDIA H100", "peak_memory_mb": 2000.0,
           "memory_source": gpu_use.BY_PROCESS, "mean_utilization_percent": 41.0}  # fmt: skip
    warning = "there is a GPU (NVIDIA H100), and nothing of this run has used it for 2 minutes"
    record["attempts"][0]["resources"]["gpus"] = [gpu]
    path.write_text(json.dumps({**record, "warnings": [warning]}))
    shown = project.grd("status", "last").out
    assert f"peak 2000 MiB ({gpu_use.BY_PROCESS}), something ran on it 41 % of the time" in shown
    assert "says nothing of how much of the GPU it used: compare the rates" in shown
    assert f"  warning     {warning}" in shown
    going = resources_text(
        {"state": "running", "resources": {"peak_memory_bytes": MB, "gpus": [gpu], "gpu_now":
         [{"uuid": "GPU-1", "utilization_percent": 7}]}}
    )  # fmt: skip
    assert any(line.endswith("something ran on it 41 % of the time, now 7 %") for line in going)
    assert "compare how fast the training goes" in going[-1]


# --- GPUs: invented answers, since there may be none here --------------------------------------------------


def gpu(
    memory: int | None, busy: int | None, *pids: int, mb: int | None = 100, visible: bool = True
) -> GPUStats:
    return GPUStats(
        gpu_id=0, name="NVIDIA H100", memory_used_mb=memory, memory_total_mb=80_000, utilization_percent=busy,
        temperature_c=None, fan_speed_percent=None, power_usage_w=None, uuid="GPU-1", visible=visible,
        processes=[{"pid": pid, "memory_mb": mb} for pid in pids],
    )  # fmt: skip


def test_a_gpu_that_nobody_uses_is_pointed_out_once() -> None:
    use = GpuUse()
    told = []
    for second in range(0, 400, 2):
        use.take(float(second), [gpu(500, 0)], {7})
        told += [(second, text) for text in use.warnings(float(second))]
    ((second, text),) = told
    assert second == gpu_use.UNUSED_SECONDS and "NVIDIA H100" in text
    assert use.summary()[0]["peak_memory_mb"] is None, "not listed is not nothing"


def test_a_gpu_that_waits_is_pointed_out_and_what_the_number_says() -> None:
    use = GpuUse()
    told = []
    for second in range(0, 400, 2):
        use.take(float(second), [gpu(900, 40 if second % 4 else 60, 7)], {7})
        told += use.warnings(float(second))
    (text,) = told
    assert "50 %" in text and "says nothing of how much" in text
    assert use.summary() == [
        {"uuid": "GPU-1", "name": "NVIDIA H100", "peak_memory_mb": 100.0, "memory_source": gpu_use.BY_PROCESS,
         "mean_utilization_percent": 50.0}
    ]  # fmt: skip


def test_a_busy_gpu_and_one_that_the_run_may_not_use_are_no_news() -> None:
    use = GpuUse()
    for second in range(0, 400, 2):
        use.take(float(second), [gpu(900, 97, 7)], {7})
        assert use.warnings(float(second)) == []
    hidden = GpuUse()
    for second in range(0, 400, 2):
        assert hidden.take(float(second), [gpu(900, 0, visible=False)], {7}) == []
        assert hidden.warnings(float(second)) == []


def test_where_the_driver_lists_other_pids_the_devices_memory_since_the_start_stands_for_ours() -> None:
    use = GpuUse()
    use.take(0.0, [gpu(500, 10, 4711)], {7})
    use.take(2.0, [gpu(2500, 90, 4711)], {7})
    (found,) = use.summary()
    assert (found["peak_memory_mb"], found["memory_source"]) == (2000.0, gpu_use.OF_DEVICE)
    use.take(4.0, [gpu(2500, 90, 7, mb=1900)], {7})
    (found,) = use.summary()
    assert (found["peak_memory_mb"], found["memory_source"]) == (1900.0, gpu_use.BY_PROCESS)


def test_memory_that_the_driver_does_not_tell_is_unknown_and_not_nothing() -> None:
    use = GpuUse()
    shown = use.take(0.0, [gpu(None, None, 7, mb=None)], {7})
    assert (shown[0]["process_memory_mb"], shown[0]["utilization_percent"]) == (None, None)
    (found,) = use.summary()
    assert (found["peak_memory_mb"], found["mean_utilization_percent"]) == (None, None)
    assert use.warnings(1000.0) == [], "it is used: it is listed"

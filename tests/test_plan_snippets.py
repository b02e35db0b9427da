"""The source plan's verify snippets, and what importing grd.experiment must not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TIMEOUT_SNIPPET = """
tm = ExperimentTimeoutManager()
assert tm.get_timeout(300) == 600
tm.request_long_running_approval(30)
assert tm.long_running_approved
assert tm.get_timeout(3600) is None
"""

CHECKPOINT_SNIPPET = """
import tempfile
from pathlib import Path
with tempfile.TemporaryDirectory() as d:
    ch = CheckpointHandler(Path(d))
    ch.save_checkpoint(epoch=5, model_state={'w': [1,2,3]}, optimizer_state={'lr': 0.01}, loss=0.5, metadata={'test': True})
    loaded = ch.load_checkpoint()
    assert loaded['epoch'] == 5
    assert loaded['loss'] == 0.5
    hints = ch.get_resumability_hints()
    assert hints['has_checkpoint'] == True
    assert loaded['model_state'] == {'w': [1, 2, 3]} and loaded['metadata'] == {'test': True}
"""  # noqa: E501

BLOCKER = """
import sys
class _Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError("not installed: " + name)
sys.meta_path.insert(0, _Blocker())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
    env.update(PYTHONPATH=str(ROOT), **environment)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def check(code: str) -> str:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("blocked", [(), ("torch", "papermill", "numpy")], ids=["all", "bare"])
@pytest.mark.parametrize("home", ["grd.experiment", "the module"])
def test_the_plans_snippets_pass_verbatim(blocked: tuple[str, ...], home: str) -> None:
    prologue = BLOCKER.format(names=blocked) if blocked else ""
    for name, module, snippet in (
        ("ExperimentTimeoutManager", "grd.experiment.timeout_manager", TIMEOUT_SNIPPET),
        ("CheckpointHandler", "grd.experiment.checkpoint_handler", CHECKPOINT_SNIPPET),
    ):
        place = module if home == "the module" else home
        check(f"{prologue}\nfrom {place} import {name}\n{snippet}")


def test_importing_everything_loads_no_heavy_package() -> None:
    heavy = ("torch", "papermill", "numpy", "mlflow", "pandas", "IPython", "nbclient", "sklearn")
    code = (
        "import sys\nimport grd.experiment\nfrom grd.experiment import *\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert check(code).strip() == "[]"


def test_the_star_import_gives_the_sorted_public_names() -> None:
    code = (
        "import grd.experiment as e\nfrom grd.experiment import *\n"
        "assert e.__all__ == sorted(e.__all__)\n"
        "assert all(name in globals() for name in e.__all__)\n"
        "import types; assert isinstance(training, types.ModuleType)\n"
        "assert callable(progress) and callable(training.epochs)"
    )
    check(code)


def test_a_training_without_torch_is_saved_and_resumed(tmp_path: Path) -> None:
    code = (
        BLOCKER.format(names=("torch", "papermill", "numpy"))
        + f"""
import sys
from grd.experiment import training
state = {{"sum": 0, "seen": []}}
for epoch in training.epochs(int(sys.argv[1]) if len(sys.argv) > 1 else N, state=state,
                             checkpoint_dir={str(tmp_path)!r}, resume=R):
    state["sum"] += epoch.index
    state["seen"].append(int(epoch))
    epoch.log(loss=1.5)
print(state, len(training.history))
"""
    )
    first = check(code.replace("else N", "else 3").replace("resume=R", "resume=False"))
    assert first.strip() == "{'sum': 3, 'seen': [0, 1, 2]} 3"
    second = check(code.replace("else N", "else 5").replace("resume=R", "resume=True"))
    assert second.strip() == "{'sum': 10, 'seen': [0, 1, 2, 3, 4]} 5"


def test_a_file_written_without_torch_is_read_with_it(tmp_path: Path) -> None:
    code = (
        "from grd.experiment import CheckpointHandler\n"
        f"ch = CheckpointHandler({str(tmp_path)!r})\n"
        "state = {'b': b'x' * 100, 't': (1, 2), 3: float('inf'), 'n': None, 's': {1, 2}}\n"
        "state['text'] = '\\u00e9\\ud800'\n"
    )
    check(BLOCKER.format(names=("torch", "numpy")) + code + "ch.save_checkpoint(1, state, None, 0.25)")
    check(code + "d = ch.load_checkpoint()\nassert d['model_state'] == state and d['loss'] == 0.25, d")


def test_without_grds_environment_reporting_is_harmless_and_silent() -> None:
    code = (
        "from grd.experiment import *\n"
        "assert list(progress(range(3), 'x')) == [0, 1, 2]\n"
        "log_metrics(loss=float('nan'), epoch=1)\nassert stop_requested() is None"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""The digest of a long run's events: looking gets cheap, and no field changes."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Project

from grd.runs.events import DIGEST_BYTES, DIGEST_SCHEMA, Digest, view_of
from grd.runs.folder import RunFolder


def write_events(path: Path, count: int, start: int = 0) -> None:
    """Epochs with inner bars, metrics, checkpoints, warnings, cells; a second attempt in the middle."""
    with open(path, "a") as stream:
        for i in range(start, start + count):
            kinds = (
                {"kind": "progress", "name": "epochs", "n": i / 10, "total": 9999},
                {"kind": "progress", "name": "steps", "n": i % 10, "total": 10, "within": "epochs"},
                {"kind": "metrics", "values": {"loss": 1 / (i + 1)}, "epoch": i // 10, "step": None},
                {"kind": "checkpoint", "epoch": i // 10, "step": i, "path": f"{i}.pt"},
                {"kind": "cell", "index": i, "status": "running", "of": 3},
                {"kind": "warning", "message": f"warning {i % 7}"},
            )
            event = kinds[i % len(kinds)]
            if i % 3000 == 0:
                event = {"kind": "state", "state": "running", "resume": i > 0}
            stream.write(json.dumps({"v": 1, "t": 1e9 + i / 4, "attempt": 1, **event}) + "\n")


def test_a_view_with_a_digest_is_the_view_of_all_events(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    digest = Digest(folder)
    for part in range(6):
        write_events(folder.events, 1400, part * 1400)
        with_digest = view_of(folder)
        if folder.digest.exists():
            folder.digest.rename(tmp_path / "aside")
            assert view_of(folder) == with_digest
            (tmp_path / "aside").rename(folder.digest)
        digest.keep_up()
    assert folder.digest.exists() and folder.events.stat().st_size > 2 * DIGEST_BYTES
    assert Digest(folder)._view.offset > DIGEST_BYTES, "the digest was not used"


def test_a_digest_that_does_not_fit_its_events_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_events(folder.events, 5000)
    Digest(folder).keep_up()
    digest = folder.digest.read_bytes()
    folder.events.unlink()
    write_events(folder.events, 6000, start=7)
    truth = view_of(folder)
    for damaged in (
        digest,
        digest[:50],
        b"",
        b"[1]",
        digest.replace(DIGEST_SCHEMA.encode(), b"grd.digest/99"),
    ):
        folder.digest.write_bytes(damaged)
        assert view_of(folder) == truth


def test_the_runner_writes_a_digest_and_status_agrees_with_the_events(project: Project) -> None:
    project.notebook(
        "chatty.ipynb",
        "import time\nfrom grd.experiment import log_metrics\n"
        "for i in range(4000): log_metrics(epoch=i, loss=1.0 / (i + 1), text=i)\n"
        "from pathlib import Path\nwhile not Path('go').exists(): time.sleep(0.05)\nlog_metrics(final=1)",
    )
    from conftest import wait_until

    project.grd("research", "chatty.ipynb", "--timeout", "5m", "--detach")
    run = project.only_run()
    wait_until((run / "events.digest.json").exists, "the digest")
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["metrics"]["text"]) == ("running", 3999)
    (project.path / "go").touch()
    assert project.grd("wait", "last", "--timeout", "60").code == 0
    result = project.grd("result", "last", "--json").json
    assert result["metrics"] == {"loss": 1 / 4000, "text": 3999, "final": 1}
    assert [row["epoch"] for row in result["history"]] == list(range(4000))

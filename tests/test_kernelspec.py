"""``grd kernelspec``: installed for tools that cannot name an engine, and never in anybody's way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import LIMIT_SECONDS, Project, write_notebook

NAME = "grd-python3"
FOREIGN = {"argv": ["other", "-f", "{connection_file}"], "display_name": "Other", "language": "python"}


@pytest.fixture
def prefix(project: Project, tmp_path: Path) -> Path:
    """A prefix where Jupyter looks, and neither the user's nor this environment's kernelspecs are touched."""
    folder = tmp_path / "prefix"
    project.environment |= {
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTER_PATH": str(folder / "share" / "jupyter"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }
    return folder


def spec(prefix: Path, name: str = NAME) -> Path:
    return prefix / "share" / "jupyter" / "kernels" / name


def tool(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that knows nothing of grd."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def write_foreign(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(FOREIGN))
    (folder / "kernel.js").write_text("theirs")
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shown(project: Project) -> dict[str, Any]:
    listed: dict[str, Any] = project.grd("kernelspec", "list", "--json").json
    return {each["name"]: each for each in listed["kernelspecs"]}


def test_what_is_installed_is_shown_by_jupyter_and_runs_a_notebook_behind_a_guardian(
    project: Project, prefix: Path
) -> None:
    done = project.grd("kernelspec", "install", "--prefix", prefix, "--json")
    assert done.code == 0, done.err
    assert (done.json["folder"], done.json["changed"], done.json["hidden"]) == (
        str(spec(prefix)),
        True,
        None,
    )
    assert done.json["python"] == sys.executable
    found = json.loads(tool(project, "jupyter", "kernelspec", "list", "--json").stdout)
    document = found["kernelspecs"][NAME]["spec"]
    assert (document["display_name"], document["language"]) == ("Python 3 (grd)", "python")
    assert shown(project)[NAME]["problem"] is None
    cell = "import os, psutil\nprint(psutil.Process(os.getppid()).cmdline())"
    write_notebook(project.path / "in.ipynb", cell)
    ran = tool(project, "papermill", "in.ipynb", "out.ipynb", "-k", NAME, "--no-progress-bar")
    assert ran.returncode == 0, ran.stderr
    assert "guardian.py" in nbformat.read(project.path / "out.ipynb", as_version=4).cells[-1].outputs[0].text


def test_the_default_is_this_environment_and_user_is_the_users_folder(project: Project, prefix: Path) -> None:
    name = ("--name", "grd-of-this-test")  # whatever this environment has is not the test's to remove
    refused = project.grd("kernelspec", "remove", *name)
    assert refused.code == 66
    assert str(Path(sys.prefix) / "share" / "jupyter" / "kernels") in refused.err
    assert project.grd("kernelspec", "install", "--user", *name).code == 0
    folder = Path(project.environment["JUPYTER_DATA_DIR"]) / "kernels" / name[1]
    assert (folder / "kernel.json").exists()
    refused = project.grd("kernelspec", "remove", *name)
    assert (refused.code, "grd kernelspec remove --user" in refused.err) == (66, True)
    assert project.grd("kernelspec", "remove", "--user", *name).code == 0
    assert not folder.exists()
    assert project.grd("kernelspec", "install", "--user", "--prefix", prefix).code == 2


def test_installing_twice_changes_nothing_and_keeps_what_was_added(project: Project, prefix: Path) -> None:
    assert project.grd("kernelspec", "install", "--prefix", prefix, "--env", "GRD_GRACE", "2m").code == 0
    file = spec(prefix) / "kernel.json"
    document = json.loads(file.read_text())
    assert document["env"] == {"GRD_GRACE": "2m"}
    document["metadata"]["mine"] = 1
    document["argv"][0] = "/gone/python"
    file.write_text(json.dumps(document))
    assert "/gone/python is gone" in shown(project)[NAME]["problem"]
    again = project.grd("kernelspec", "install", "--prefix", prefix, "--json")
    assert (again.json["changed"], again.json["replaced"]) == (True, False)
    before = file.stat()
    third = project.grd("kernelspec", "install", "--prefix", prefix, "--json")
    assert (third.code, third.json["changed"]) == (0, False)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    document = json.loads(file.read_text())
    assert (document["argv"][0], document["metadata"]["mine"]) == (sys.executable, 1)
    assert document["env"] == {"GRD_GRACE": "2m"}


def test_a_kernelspec_of_somebody_else_is_left_alone_unless_it_is_to_be_replaced(
    project: Project, prefix: Path
) -> None:
    before = write_foreign(spec(prefix))
    for command in (("install",), ("remove",)):
        refused = project.grd("kernelspec", *command, "--prefix", prefix)
        assert refused.code == 2
        assert "grd did not install" in refused.err
        assert content(spec(prefix)) == before
    replaced = project.grd("kernelspec", "install", "--prefix", prefix, "--replace", "--json")
    assert (replaced.code, replaced.json["replaced"]) == (0, True)
    assert "kernel.js" not in content(spec(prefix))
    assert json.loads((spec(prefix) / "kernel.json").read_text())["display_name"] == "Python 3 (grd)"


def test_replacing_a_linked_kernelspec_leaves_what_it_links_to(project: Project, prefix: Path) -> None:
    before = write_foreign(prefix / "theirs")
    spec(prefix).parent.mkdir(parents=True)
    spec(prefix).symlink_to(prefix / "theirs")
    assert project.grd("kernelspec", "install", "--prefix", prefix).code == 2
    assert project.grd("kernelspec", "install", "--prefix", prefix, "--replace").code == 0
    assert not spec(prefix).is_symlink()
    assert content(prefix / "theirs") == before


def test_removing_leaves_files_that_are_not_ours(project: Project, prefix: Path) -> None:
    assert project.grd("kernelspec", "install", "--prefix", prefix, "--name", "mine").code == 0
    (spec(prefix, "mine") / "notes.txt").write_text("mine")
    done = project.grd("kernelspec", "remove", "--prefix", prefix, "--name", "mine", "--json")
    assert (done.code, done.json["folder_stays"]) == (0, True)
    assert list(content(spec(prefix, "mine"))) == ["notes.txt"]
    assert shown(project) == {}


def test_one_that_tools_will_not_get_is_installed_but_says_so(
    project: Project, prefix: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    done = project.grd("kernelspec", "install", "--prefix", elsewhere)
    assert done.code == 0
    assert f"JUPYTER_PATH={elsewhere / 'share' / 'jupyter'}" in done.out
    shutil.copytree(elsewhere, prefix)
    done = project.grd("kernelspec", "install", "--user", "--json")
    assert (done.code, "found first" in done.json["hidden"]) == (0, True)


def test_a_wrong_name_or_an_unwritable_folder_is_one_line_with_the_next_thing_to_type(
    project: Project, prefix: Path
) -> None:
    refused = project.grd("kernelspec", "install", "--prefix", prefix, "--name", "a/b")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    prefix.write_text("a file")
    refused = project.grd("kernelspec", "install", "--prefix", prefix)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--user" in refused.err


def test_two_installations_at_once_leave_one_whole_kernelspec(project: Project, prefix: Path) -> None:
    started = [project.start("kernelspec", "install", "--prefix", prefix) for _ in range(4)]
    assert [project.finish(each).code for each in started] == [0, 0, 0, 0]
    assert json.loads((spec(prefix) / "kernel.json").read_text())["argv"][0] == sys.executable
    assert not list(spec(prefix).glob("*.tmp"))


def test_an_installation_that_was_killed_is_simply_done_again(project: Project, prefix: Path) -> None:
    spec(prefix).mkdir(parents=True)
    (spec(prefix) / "logo-32x32.png").write_bytes(b"half")
    (spec(prefix) / ".kernel.json.abc.tmp").write_text("{")
    done = project.grd("kernelspec", "install", "--prefix", prefix)
    assert done.code == 0, done.err
    assert (spec(prefix) / "kernel.json").is_file()
    assert len((spec(prefix) / "logo-32x32.png").read_bytes()) > 100


def test_the_magic_types_the_same_command(project: Project, prefix: Path) -> None:
    code = (
        "from IPython.testing.globalipapp import start_ipython\n"
        "shell = start_ipython()\nshell.run_line_magic('load_ext', 'grd')\n"
        f"done = shell.run_line_magic('grd', 'kernelspec install --prefix {prefix}')\n"
        "listed = shell.run_line_magic('grd', 'kernelspec list')\n"
        "print(done['name'], done['changed'], len(listed['kernelspecs']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=project.environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.splitlines()[-1] == f"{NAME} True 1", ran.stderr

"""Runs papermill's own test suite twice, with papermill's engine and with grd, and compares.

The suite comes from the source package of the installed papermill version, through pip; nothing of it is
kept. Exits 0 if the two differ in exactly the tests that ``differences.toml`` names, each with its reason.

A test that fails with papermill's own engine alone is run once more with it: that engine loses a race for
ports now and then. A failure with grd is never repeated.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

CLOUD_MODULES = ("test_abs", "test_adl", "test_gcs", "test_hdfs", "test_s3")
"""Need the libraries of five cloud stores, and execute no notebook: no engine takes part in them."""

LEAST_TESTS = 450
"""2.7.0 has 502. Fewer would mean that the suite was not found, not that it passed."""

LIMIT_SECONDS = 900


def main() -> int:
    """Compare; 0 if nothing unexpected was seen, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="2", help="pytest-xdist's -n")
    workers = parser.parse_args().workers
    version = importlib.metadata.version("papermill")
    expected = tomllib.loads((HERE / "differences.toml").read_text(encoding="utf-8"))
    if expected["papermill"] != version:
        print(
            f"differences.toml is about papermill {expected['papermill']}; this is {version}", file=sys.stderr
        )
    with tempfile.TemporaryDirectory(prefix="papermill-suite-") as name:
        suite = download(version, Path(name))
        environment = grd_everywhere(Path(name))
        check_that_grd_is_used(suite, environment)
        theirs = outcomes(suite, plain_environment(), workers)
        ours = outcomes(suite, environment, workers)
        theirs |= repeated(suite, plain_environment(), theirs, ours)
    return report(theirs, ours, {entry["test"]: entry["reason"] for entry in expected["difference"]})


def download(version: str, folder: Path) -> Path:
    """The unpacked source package of papermill ``version``, from wherever pip is told to look."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-binary", ":all:", f"papermill=={version}", "-d", str(folder)], check=True)
    with tarfile.open(folder / f"papermill-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"papermill-{version}"


def plain_environment() -> dict[str, str]:
    """No setting of ours; papermill's engine is the default."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GRD_")}


def grd_everywhere(folder: Path) -> dict[str, str]:
    """An environment in which papermill finds, by an entry point, the module that puts grd in its place."""
    paths = folder / "grd-for-all"
    metadata = paths / "grd_for_all-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: grd-for-all\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[papermill.engine]\ngrd-for-all = grd_for_all:Everywhere\n")
    (paths / "grd_for_all.py").write_bytes((HERE / "grd_for_all.py").read_bytes())
    environment = plain_environment()
    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(paths), *([known] if known else [])])
    return environment


def check_that_grd_is_used(suite: Path, environment: dict[str, str]) -> None:
    """One notebook through papermill's command line, no engine named: grd must have written into it."""
    notebook = suite / "papermill" / "tests" / "notebooks" / "simple_execute.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "-", "-k", "python3"]
    done = subprocess.run(command, cwd=suite, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode or "grd" not in json.loads(done.stdout)["metadata"]:
        sys.exit(f"grd is not what papermill executes with here: {done.stderr.decode()}")


def repeated(
    suite: Path, environment: dict[str, str], theirs: dict[str, str], ours: dict[str, str]
) -> dict[str, str]:
    """How those tests end on a second try that only papermill's own engine failed; told in the output."""
    again = [
        test for test, end in theirs.items() if end in ("failure", "error") and ours.get(test) == "passed"
    ]
    if not again:
        return {}
    ends = outcomes(suite, environment, "1", again)
    for test in again:
        print(f"  run again with papermill's own engine, which failed it alone: {test}: {ends.get(test)}")
    return ends


def node_id(suite: Path, test: str) -> str:
    """pytest's name of ``test``, given as JUnit has it: ``package.module.Class::name``."""
    dotted, _, name = test.partition("::")
    parts = dotted.split(".")
    count = next(
        n for n in range(len(parts), 0, -1) if (suite / "/".join(parts[:n])).with_suffix(".py").exists()
    )
    return "::".join(["/".join(parts[:count]) + ".py", *parts[count:], name])


def outcomes(
    suite: Path, environment: dict[str, str], workers: str, tests: list[str] | None = None
) -> dict[str, str]:
    """The suite's tests (or those of ``tests``) and how each ended: passed, skipped, failure or error."""
    results = suite / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n", workers, "--dist", "load", f"--junitxml={results}", "--timeout=300"]
    command += [node_id(suite, test) for test in tests] if tests else ["papermill/tests"]
    command += [f"--ignore=papermill/tests/{module}.py" for module in CLOUD_MODULES]
    subprocess.run(command, cwd=suite, env=environment, stdin=subprocess.DEVNULL, timeout=LIMIT_SECONDS)
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        ended = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}::{case.get('name')}"] = ended[0] if ended else "passed"
    return found


def report(theirs: dict[str, str], ours: dict[str, str], expected: dict[str, str]) -> int:
    """Print the comparison; 1 if it is not the expected one."""
    different = {
        test: (theirs.get(test, "missing"), ours.get(test, "missing"))
        for test in sorted(theirs.keys() | ours.keys())
        if theirs.get(test) != ours.get(test)
    }
    both_fail = sorted(test for test, end in theirs.items() if end not in ("passed", "skipped"))
    print(f"\n{len(theirs)} tests with papermill's engine, {len(ours)} with grd; {len(different)} differ")
    for test in both_fail:
        print(f"  fails with papermill's own engine too: {test}")
    for test, reason in expected.items():
        if test in different:
            print(f"  differs as expected: {test}\n    {reason}")
    unexpected = [
        f"{test}: papermill {was}, grd {ended}"
        for test, (was, ended) in different.items()
        if test not in expected
    ]
    stale = [
        f"{test}: listed in differences.toml, but does not differ"
        for test in expected
        if test not in different
    ]
    for line in unexpected + stale:
        print(f"  WRONG {line}")
    few = min(len(theirs), len(ours)) < LEAST_TESTS
    if few:
        print(f"  WRONG fewer than {LEAST_TESTS} tests: the suite did not run")
    return 1 if unexpected or stale or few else 0


if __name__ == "__main__":
    sys.exit(main())

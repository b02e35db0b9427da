"""Which version of the code this is: git's commit and branch, and whether anything was changed since.

Commit, branch and remote are read from git's own files, which needs no git and costs no process; only
whether there are changes is asked of git, with a limit.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from grd import settings
from grd.errors import GrdError
from grd.hardware.facts import Facts, run_limited

GIT_SECONDS = 5.0
"""git answers in milliseconds; in a huge repository on a network disk it is not waited for any longer."""

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_LOCAL = re.compile(r"/(?!/)|\.\.?/|~|file:///", re.IGNORECASE)
_HOST = r"(?:\[[0-9a-f:.%]+\]|[\w.-]+)"
# The user is all up to the last "@". None may follow: what stands before it might still be the password's.
_URL = re.compile(
    rf"(?P<before>[a-z][a-z0-9+.-]*://)([^/?#]*@)?(?P<host>{_HOST}(?::\d*)?)(?P<path>[/?#][^@]*)?",
    re.IGNORECASE,
)
_SCP = re.compile(rf"(?P<user>.*@)?(?P<host>{_HOST})(?P<path>:(?!:|//)[^@]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Repository:
    """A work tree: ``own`` is its git folder, ``common`` the one that holds refs and configuration."""

    tree: Path
    own: Path
    common: Path


def find_repository(folder: Path) -> Repository | None:
    """The work tree that holds ``folder``, or None. Raises OSError if git's files cannot be read."""
    for tree in (folder.resolve(), *folder.resolve().parents):
        dot_git = tree / ".git"
        if dot_git.is_file():  # a linked work tree or a submodule
            named = dot_git.read_text("utf-8").partition("gitdir:")[2].strip()
            own = (tree / named).resolve()
        elif dot_git.is_dir():
            own = dot_git
        else:
            continue
        common = own / "commondir"
        shared = (own / common.read_text("utf-8").strip()).resolve() if common.is_file() else own
        return Repository(tree, own, shared)
    return None


def _resolve(repository: Repository, ref: str) -> str | None:
    for folder in (repository.own, repository.common):
        loose = folder / ref
        if loose.is_file():
            text = loose.read_text("ascii").strip()
            return text if _HASH.fullmatch(text) else None
    packed = repository.common / "packed-refs"
    if packed.is_file():
        for line in packed.read_text("utf-8", "replace").splitlines():
            commit, _, name = line.partition(" ")
            if name == ref and _HASH.fullmatch(commit):
                return commit
    return None


def _head(repository: Repository) -> tuple[str | None, str | None]:
    """Commit and branch; the branch is None where HEAD is detached, the commit before the first one."""
    text = (repository.own / "HEAD").read_text("utf-8").strip()
    if not text.startswith("ref:"):
        return (text if _HASH.fullmatch(text) else None), None
    ref = text.partition("ref:")[2].strip()
    return _resolve(repository, ref), ref.removeprefix("refs/heads/")


def without_credentials(url: str) -> str | None:
    """A remote's URL without user, password, query and fragment, any of which may be a secret.

    None where it cannot be told whether a part of a password is left: passwords hold "/", "@", "?" and "#",
    too. The user git of "git@host:path" stays, as it is everybody's. A path on this machine is no URL.
    """
    url = url.strip()
    if _LOCAL.match(url):
        return url
    if parts := _URL.fullmatch(url):
        before = parts["before"]
    elif "://" not in url and (parts := _SCP.fullmatch(url)):
        before = "git@" if parts["user"] == "git@" else ""
    else:
        return None
    return f"{before}{parts['host']}{re.split('[?#]', parts['path'] or '')[0]}"


def _remote(repository: Repository) -> str | None:
    config = configparser.RawConfigParser(strict=False, allow_no_value=True)
    text = (repository.common / "config").read_text("utf-8", "replace")
    config.read_string("\n".join(line.strip() for line in text.splitlines()))
    url = config.get('remote "origin"', "url", fallback=None)
    if not url:
        return None
    # As git reads it: what stands in quotes, else what stands before a comment.
    url = url.strip('"') if url.startswith('"') else re.split("[#;]", url)[0]
    bare = without_credentials(url)
    if bare is None:
        raise ValueError("the URL of origin may hold a password, and is not kept")
    return bare


_RUN = re.compile(r"(\d{8}-\d{6}-[^/]*|batches|loop|\.[^/]*)/?")
"""What grd makes in the folder of the runs."""


def _is_grds_own(name: str, project: str, runs: str) -> bool:
    """Whether what git does not track, by its path in the work tree, is what runs and reports have left.

    git names a folder, with "/" at its end, where it tracks nothing in it.
    """
    for folder in (runs, f"{project}.planning/", f"{project}loops/"):
        if name == folder:
            return True
    if name.startswith(runs):
        return _RUN.fullmatch(name.removeprefix(runs)) is not None
    return name.startswith(f"{project}.planning/.state-page")


def _places(repository: Repository, folder: Path) -> tuple[str, str]:
    """The project around ``folder`` and its folder of runs, as git names folders of the work tree."""
    root = settings.find_project_root(folder)
    runs = "experiments"
    with contextlib.suppress(GrdError):
        runs = settings.load_settings(root)[0].runs_dir
    named = []
    for path in (root, root / Path(runs).expanduser()):
        inside = path.resolve().is_relative_to(repository.tree)
        name = path.resolve().relative_to(repository.tree).as_posix() if inside else "/"
        named.append("" if name == "." else f"{name}/")
    return named[0], named[1]


MOST_FILES, LARGEST_BYTES = 1000, 1 << 20
"""Of untracked files so many are read, and none that is larger: code is small, and the rest is known by size
and time of change."""


def _contents(tree: Path, names: list[bytes]) -> bytes:
    """A digest of untracked files, which git's difference leaves out."""
    digest = hashlib.sha256()
    for number, name in enumerate(sorted(filter(None, names))):
        with contextlib.suppress(OSError):
            path = tree / os.fsdecode(name)
            found = path.lstat()
            digest.update(b"%s\0%d\0" % (name, found.st_size))
            if number < MOST_FILES and found.st_size <= LARGEST_BYTES and stat.S_ISREG(found.st_mode):
                digest.update(path.read_bytes())
            else:
                digest.update(b"%d" % found.st_mtime_ns)
    return digest.digest()


def _changes(repository: Repository, folder: Path) -> str:
    """A digest of what differs from the commit, tracked and untracked; "" for nothing.

    What grd itself writes there (runs, its two pages in .planning) is no change of the code. Raises OSError,
    TimeoutError or RuntimeError if git cannot tell.
    """
    # No optional locks: looking must not disturb a git that works in the same tree. No external programs:
    # a repository's own configuration must not run code here.
    git = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(repository.tree)]
    project, runs = _places(repository, folder)
    pages = [f":(exclude,top,literal){project}.planning/{page}" for page in ("DATA_REPORT.md", "STATE.md")]
    but_pages = ["--", ":(top)", *pages]
    told = run_limited(
        [*git, "status", "--porcelain=v1", "--untracked-files=normal", "-z", *but_pages], GIT_SECONDS
    )
    entries = [
        entry
        for entry in told.split(b"\0")
        if entry and not (entry[:3] == b"?? " and _is_grds_own(os.fsdecode(entry[3:]), project, runs))
    ]
    if not entries:
        return ""
    status = b"\0".join(entries)
    untracked = [os.fsdecode(entry[3:]) for entry in entries if entry[:3] == b"?? "]
    if untracked:
        which = [f":(top,literal){name.rstrip('/')}" for name in untracked]
        listed = run_limited(
            [*git, "ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", *which],
            GIT_SECONDS,
        )
        status += b"\0" + _contents(repository.tree, listed.split(b"\0"))
    difference = run_limited(
        [*git, "diff", "--no-ext-diff", "--no-textconv", "HEAD", *but_pages], GIT_SECONDS
    )
    return hashlib.sha256(status + b"\0" + difference).hexdigest()


def code_version(folder: Path, *, ask_git: bool = True) -> Facts:
    """commit, branch, remote, dirty, changes_sha256 of the git work tree around ``folder``. Never raises.

    ``changes_sha256`` names the uncommitted changes, so that two dirty runs can be told apart.
    """
    facts = Facts()
    names = ("commit", "branch", "remote", "dirty", "changes_sha256")
    try:
        repository = find_repository(folder)
    except (OSError, ValueError) as error:
        repository, unknown = None, f"git's files cannot be read: {error}"
    else:
        unknown = "not in a git repository"
    if repository is None:
        for name in names:
            facts.put(name, None, unknown)
        return facts
    found = repository
    facts.ask("commit", lambda: _head(found)[0], "there is no commit yet")
    facts.ask("branch", lambda: _head(found)[1], "HEAD is detached")
    facts.ask("remote", lambda: _remote(found), "there is no remote called origin")
    if not ask_git or shutil.which("git") is None or facts.values["commit"] is None:
        reason = "there is no commit yet" if facts.values["commit"] is None else "git is not installed"
        facts.put("dirty", None, reason if ask_git else "not asked")
        facts.put("changes_sha256", None, reason if ask_git else "not asked")
        return facts
    digest = facts.ask("changes_sha256", lambda: _changes(found, folder), "there are no changes")
    failed = digest is None and facts.reasons["changes_sha256"] != "there are no changes"
    facts.put("dirty", None if failed else digest is not None, facts.reasons.get("changes_sha256", ""))
    return facts

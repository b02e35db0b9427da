"""What can go wrong, as a tree.

GrdError
├── UsageError                  the caller asked for something that cannot be
│   ├── ParameterError          a notebook parameter: unknown, wrong type, no identifier
│   └── NotebookError           the notebook is no valid notebook
├── NotFoundError
│   ├── NotebookNotFound
│   └── RunNotFound
├── ResourceUnavailable         something the machine should have and has not
│   ├── KernelUnavailable
│   ├── RunBusy                 another process holds the run's lock
│   └── NotebookBusy            another process is executing into this notebook
├── ApprovalRequired            nobody agreed to this
├── ConfigurationError          a settings file or GRD_* variable is wrong
├── ReportError                 a report file cannot be edited without damage
├── CheckpointError
│   ├── CheckpointCorrupt       the bytes are not those that were written
│   ├── CheckpointRefused       the state cannot be stored or loaded safely
│   └── CheckpointFenced        a newer attempt owns the folder
└── ResumeError                 the run cannot be resumed as asked

ExperimentInterrupted (Exception)     raised in a notebook after a stop request was honoured
ApprovalDeclined (TimeoutError)       raised by ``experiment_context`` when the answer was no
CommandTimedOut (TimeoutError)        raised by ``run_with_timeout``, with the output so far

Every message is one line that says what happened, to what, and what to type next. Exit codes belong to
``interfaces/cli/exit_codes.py``.
"""

from __future__ import annotations


class GrdError(Exception):
    """Base of every error grd raises on purpose."""


class UsageError(GrdError):
    """The caller asked for something that cannot be done as asked."""


class ParameterError(UsageError):
    """A notebook parameter is unknown, has the wrong type, or is no identifier."""


class NotebookError(UsageError):
    """The file is not a notebook that can be run."""


class NotFoundError(GrdError):
    """Something named by the caller does not exist."""


class NotebookNotFound(NotFoundError):
    """There is no notebook at this path."""


class RunNotFound(NotFoundError):
    """There is no run of this name in this project."""


class ResourceUnavailable(GrdError):
    """A kernel, device or lock that is needed cannot be had."""


class KernelUnavailable(ResourceUnavailable):
    """No kernel of this name is installed, or it could not be started."""


class RunBusy(ResourceUnavailable):
    """Another process is executing this run."""


class NotebookBusy(ResourceUnavailable):
    """Another process is executing into this notebook, outside of any run."""


class ApprovalRequired(GrdError):
    """Nobody has agreed to this; the message names the command that does."""


class ConfigurationError(GrdError):
    """A settings file or GRD_* variable cannot be used."""


class ReportError(GrdError):
    """A report file could not be edited; it was left as it was."""


class CheckpointError(GrdError):
    """A checkpoint could not be written or read."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's bytes are not those that were written."""


class CheckpointRefused(CheckpointError):
    """The state, or the file, needs code to be loaded; the message names the key."""


class CheckpointFenced(CheckpointError):
    """A newer attempt of the run owns this checkpoint folder."""


class ResumeError(GrdError):
    """The run cannot be resumed as asked; the message says why and what can be done."""


class ExperimentInterrupted(Exception):
    """Raised in the notebook once a stop request has been honoured and the state is saved.

    Not a `GrdError`: nothing went wrong. Later cells do not run, and the run ends ``interrupted``.
    """

    def __init__(
        self, message: str = "the experiment was asked to stop", *, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason


class ApprovalDeclined(TimeoutError):
    """A long-running experiment was declined."""


class CommandTimedOut(TimeoutError):
    """A command was ended because its time was up; ``stdout`` and ``stderr`` are its output so far."""

    def __init__(self, message: str = "Command timed out", *, stdout: str = "", stderr: str = "") -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr

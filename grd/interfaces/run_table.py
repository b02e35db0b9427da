"""Several runs as one object: what ``grd list`` finds."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from grd.interfaces.cli.rendering import format_number, local_time
from grd.runs import retry
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.steps.run import Run

_COLUMNS = ("RUN", "STATE", "CAUSE", "STARTED", "METRICS", "BATCH")


class RunTable(Sequence[Run]):
    """Runs in order; an element is a `Run`, by position or by id. States are those of the moment of listing.

    ``total`` counts those that a limit left out too.
    """

    def __init__(
        self, entries: Sequence[tuple[RunFolder, RunRecord]], *, runs_dir: Path, total: int | None = None
    ) -> None:
        self._entries = list(entries)
        self.runs_dir = runs_dir
        self.total = len(self._entries) if total is None else total

    @property
    def _records(self) -> list[RunRecord]:
        return [record for _, record in self._entries]

    @overload
    def __getitem__(self, which: int | str) -> Run: ...

    @overload
    def __getitem__(self, which: slice) -> RunTable: ...

    def __getitem__(self, which: int | str | slice) -> Run | RunTable:
        if isinstance(which, slice):
            return RunTable(self._entries[which], runs_dir=self.runs_dir)
        if isinstance(which, str):
            for folder, _ in self._entries:
                if folder.run_id == which:
                    return Run(folder)
            raise KeyError(which)
        return Run(self._entries[which][0])

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Run]:
        return (Run(folder) for folder, _ in self._entries)

    def to_dict(self) -> dict[str, Any]:
        """What ``grd list --json`` prints."""
        rows = [row(record) for record in self._records]
        return {"schema": "grd.list/1", "runs_dir": str(self.runs_dir), "total": self.total, "runs": rows}

    @property
    def df(self) -> Any:
        """A pandas DataFrame, a row for each run; parameters and metrics get columns. Needs pandas."""
        import pandas

        return pandas.json_normalize(self.to_dict()["runs"])

    def lines(self) -> list[str]:
        """The table as text."""
        if not self._entries:
            return [f"no runs in {self.runs_dir}; start one: grd research NOTEBOOK"]
        width = max(len(record.run_id) for record in self._records)
        shown = self._shown()
        metrics_width = max(len(cells[4]) for cells in shown)
        lines = []
        for run, state, cause, started, metrics, *batch in shown:
            last = f"{metrics:<{metrics_width}}  {batch[0]}" if batch else metrics
            lines.append(f"{run:<{width}}  {state:<11}  {cause:<17}  {started:<19}  {last}".rstrip())
        if self.total > len(self):
            lines.append(f"... {self.total - len(self)} more; --limit shows them")
        return lines

    def _shown(self) -> list[tuple[str, ...]]:
        """Head line and cells; where no run is of a batch, nobody needs that column."""
        rows: list[tuple[str, ...]] = [_COLUMNS, *map(_cells, self._records)]
        return rows if any(record.batch for record in self._records) else [cells[:-1] for cells in rows]

    def __repr__(self) -> str:
        return f"<RunTable of {len(self)} of {self.total} runs in {self.runs_dir}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else "\n".join(self.lines()))

    def _repr_html_(self) -> str:
        if not self._entries:
            return f"<p>{html.escape(self.lines()[0])}</p>"

        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        columns, *rows = self._shown()
        body = "".join(line("td", cells) for cells in rows)
        left_out = self.total - len(self)
        more = f"<p>{left_out} more; <code>--limit</code> shows them</p>" if left_out > 0 else ""
        return f"<table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>{more}"


def row(record: RunRecord) -> dict[str, Any]:
    """A run in a list or overview, as JSON values."""
    names = (
        "run_id",
        "state",
        "cause",
        "detail",
        "resumable",
        "attempt",
        "created_at",
        "started_at",
        "ended_at",
    )
    more = ("parameters", "metrics", "progress", "checkpoint", "resume_command", "batch", "folder")
    told = {name: getattr(record, name) for name in (*names, *more)}
    return {**told, "retry": retry.shown(RunFolder(Path(record.folder)), record)}


def _cells(record: RunRecord) -> tuple[str, ...]:
    metrics = " ".join(f"{name}={format_number(value)}" for name, value in record.metrics.items())
    batch = str((record.batch or {}).get("id") or "-")
    return record.run_id, record.state, record.cause or "-", local_time(record.started_at), metrics, batch

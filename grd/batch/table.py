"""The runs of a batch as a table: for people, for spreadsheets, for Jupyter."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from grd import contract
from grd.batch.values import one_line, value_text
from grd.errors import ResourceUnavailable
from grd.settings import format_duration


class Table:
    """What `grd batch status` shows, made of its JSON document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._rows: list[dict[str, Any]] = document["runs"]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return self.document

    @property
    def df(self) -> Any:
        """A pandas DataFrame, a row for each run; parameters and metrics get columns. Needs pandas."""
        try:
            import pandas
        except ImportError:
            raise ResourceUnavailable("a DataFrame needs pandas: pip install pandas") from None
        return pandas.json_normalize(self._rows)

    def csv(self) -> str:
        """All rows with a head line; columns ``parameters.NAME`` and ``metrics.NAME`` have those. NaN stands
        for what was not finite."""
        plain = ("index", "run_id", "state", "cause", "notebook")
        times = ("attempts", "started_at", "ended_at", "seconds", "found", "detail")
        parameters, metrics = self._names("parameters"), self._names("metrics")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                *plain,
                *(f"parameters.{name}" for name in parameters),
                *(f"metrics.{name}" for name in metrics),
                *times,
            ]
        )
        for row in self._rows:
            writer.writerow(
                [
                    *(_cell(row[name]) for name in plain),
                    *(_cell(row["parameters"].get(name)) for name in parameters),
                    *(_metric_cell(row["metrics"], name) for name in metrics),
                    *(_cell(row[name]) for name in times),
                ]
            )
        return text.getvalue()

    def lines(self) -> list[str]:
        """The batch and its table as text."""
        return [*self.head(), "", *_aligned([self._columns(), *map(self._cells, self._rows)]), *self.foot()]

    def head(self) -> list[str]:
        """State, counts and where it lies."""
        shown = self.document
        because = f" ({shown['cause']})" if shown["cause"] else ""
        counts = ", ".join(f"{count} {state}" for state, count in shown["counts"].items())
        lines = [f"{shown['batch_id']}: {shown['state']}{because}; of {shown['total']} runs {counts}"]
        if shown["detail"]:
            lines.append(f"  {shown['detail']}")
        lines.append(f"  folder      {shown['folder']}")
        return lines

    def foot(self) -> list[str]:
        """Why runs failed or were refused, once each, and the next command."""
        lines = []
        told: dict[str, list[int]] = {}
        for row in self._rows:
            if row["detail"] and row["state"] in (contract.FAILED, contract.DECLINED):
                told.setdefault(row["detail"], []).append(row["index"] + 1)
        for detail, numbers in list(told.items())[:5]:
            which = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            lines.append(f"  run {which}: {one_line(detail)}")
        if self.document["resume_command"]:
            lines.append(f"  next        {self.document['resume_command']}")
        elif self.document["state"] == contract.FAILED:
            lines.append(f"  next        grd batch resume {self.document['batch_id']} --failed")
        elif self.document["state"] == contract.RUNNING:
            lines.append(f"  next        grd batch wait {self.document['batch_id']}")
        return lines

    def _names(self, what: str) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row[what]))

    def _columns(self) -> list[str]:
        several = len({row["notebook"] for row in self._rows}) > 1
        return [
            "#",
            *(["NOTEBOOK"] if several else []),
            *self._names("parameters"),
            "STATE",
            "CAUSE",
            "TIME",
            *self._names("metrics"),
            "RUN",
        ]

    def _cells(self, row: dict[str, Any]) -> list[str]:
        several = len({each["notebook"] for each in self._rows}) > 1
        found = " (found)" if row["found"] and row["state"] == contract.COMPLETED else ""
        return [
            str(row["index"] + 1),
            *([row["notebook"].rpartition("/")[2]] if several else []),
            *(_parameter(row["parameters"], name) for name in self._names("parameters")),
            f"{row['state']}{found}",
            row["cause"] or "-",
            "-" if row["seconds"] is None else format_duration(row["seconds"]),
            *(_metric(row["metrics"], name) for name in self._names("metrics")),
            row["run_id"] or "-",
        ]

    def __repr__(self) -> str:
        return f"<Table of {len(self._rows)} runs of {self.document['batch_id']}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else "\n".join(self.lines()))

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head = "".join(f"<p>{html.escape(text.strip())}</p>" for text in self.head())
        body = "".join(line("td", self._cells(row)) for row in self._rows)
        foot = "".join(f"<p>{html.escape(text.strip())}</p>" for text in self.foot())
        return f"{head}<table><thead>{line('th', self._columns())}</thead><tbody>{body}</tbody></table>{foot}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _metric_cell(metrics: Mapping[str, Any], name: str) -> str:
    return "NaN" if name in metrics and metrics[name] is None else _cell(metrics.get(name))


def _parameter(parameters: Mapping[str, Any], name: str) -> str:
    value = parameters.get(name)
    return "-" if value is None else value_text(value)


def _metric(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    value = metrics[name]
    return (
        contract.NOT_FINITE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]

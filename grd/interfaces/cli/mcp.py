"""``grd mcp``: the tools for agents, by the Model Context Protocol."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from grd.errors import ResourceUnavailable, UsageError
from grd.interfaces.cli.answer import Answer, AnsweringCommand, surface
from grd.interfaces.cli.rendering import say

_INSTALL = "pip install 'grd-notebooks[mcp]'"
_PACKAGES = ("mcp", "mcp_types", "anyio")


@click.command(cls=AnsweringCommand)
@click.option(
    "--project",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The project's folder. Default: where the client starts the command.",
)
def mcp(project: Path | None) -> Answer:
    """Serve the tools for agents on stdin and stdout, for an MCP client to start.

    Tools: run_start, run_status, run_wait, run_logs, run_stop, run_resume, run_result. Runs outlive the
    server. README has the client's configuration.
    """
    if not surface().prints:
        raise UsageError("grd mcp is started by an MCP client, or in a shell")
    try:
        from grd.interfaces.mcp.server import serve
    except ImportError as error:
        # Version 1 of the SDK has none of what version 2 is imported from.
        if (error.name or "").split(".")[0] not in _PACKAGES:
            raise
        raise ResourceUnavailable(f"grd mcp needs version 2 of the MCP SDK: {_INSTALL}") from None
    if project is not None:
        os.chdir(project)
    if sys.stdin.isatty():
        say("serving MCP on stdin and stdout, which is for a client to start; Ctrl-C ends it")
    serve()
    return Answer()

"""The MCP server of one project, on stdin and stdout.

Runs are processes of their own: whatever ends the server, they go on. So it may end at once, whenever.
"""

from __future__ import annotations

import inspect
import os
import signal
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations

import grd
from grd import contract
from grd.interfaces.mcp import tools
from grd.interfaces.mcp.arguments import strict

INSTRUCTIONS = """\
grd runs Jupyter notebooks as ML experiments that survive: a run goes on when this conversation or this server
ends; it can be interrupted at any moment and resumed from its last checkpoint.
Begin with run_status. Then: run_start (with a key) -> run_wait, again while ended is false -> run_result.
If your calls may last less than 50 s, give run_wait fewer seconds than that.
Each answer has next: the tool to call now, with its arguments. Where its tool is null there is nothing to
call, or a person must decide: ask them. No tool agrees to more time than was granted; do not look for a way
around that."""

_LOOKS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_STARTS = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=True)
_STOPS = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False
)


def build() -> Any:
    """The server with its tools and its resource, for the project of the working folder."""
    offered = [
        strict(tool, description=inspect.getdoc(tool), annotations=kind)
        for tool, kind in (
            (tools.run_start, _STARTS),
            (tools.run_status, _LOOKS),
            (tools.run_wait, _LOOKS),
            (tools.run_logs, _LOOKS),
            (tools.run_stop, _STOPS),
            (tools.run_resume, _STARTS),
            (tools.run_result, _LOOKS),
        )
    ]
    server = MCPServer(
        "grd",
        version=grd.__version__,
        instructions=INSTRUCTIONS,
        tools=offered,
        log_level="WARNING",
    )
    server.resource("grd://runs/{run_id}/record", name="record", mime_type="application/json")(tools.record)
    return server


def serve() -> None:
    """Answer on stdin and stdout until stdin ends, or a signal comes, or nobody reads the answers any more.

    The SDK keeps both to itself: what else reads stdin finds nothing, what else prints goes to stderr.
    """
    os.environ[contract.ENV_NONINTERACTIVE] = "1"  # a question would reach nobody
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        # Nothing needs to be tidied up, and Python's own handling would wait for the thread that reads stdin.
        signal.signal(signum, signal.SIG_DFL)
    build().run("stdio")

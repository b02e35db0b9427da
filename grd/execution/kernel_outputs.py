"""An IPython extension for kernels that grd starts: a kernel that prints faster than is read waits.

ZeroMQ's PUB and XPUB sockets drop messages once 1,000 of them wait for a reader. What is lost that way may
be any output, or the message that the cell has ended, for which a client would wait for ever. With
XPUB_NODROP the sending thread blocks instead until the reader has caught up.
"""

from __future__ import annotations

import contextlib
from typing import Any

import zmq


def load_ipython_extension(shell: Any) -> None:
    """Switch dropping off, in the thread that owns the socket; without effect where that is not possible."""
    with contextlib.suppress(AttributeError):
        thread = shell.kernel.iopub_socket.io_thread
        thread.schedule(lambda: _never_drop(thread.socket))


def _never_drop(socket: Any) -> None:
    with contextlib.suppress(zmq.ZMQError, AttributeError):
        socket.setsockopt(zmq.XPUB_NODROP, 1)

"""A client of a kernel that reads what has come at once, and waits for nothing that need not be waited for.

jupyter_client's takes each message through several futures of the event loop. A kernel that publishes much
is held up by that, for it waits for its reader (`kernel_outputs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import datetime
from queue import Empty
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.utils import ensure_async
from traitlets import Type

Message = dict[str, Any]

READ_SECONDS = 0.05
"""After so long without a pause other work has its turn: replies, limits, the kernel's end."""

RECONNECT_MILLISECONDS = 20
"""A kernel's sockets open some time after its start; ZeroMQ's default looks again only after 100 ms."""


LOOK_SECONDS = 0.1
"""How long a channel that is also written to waits to be told of a message before it looks by itself."""


class TwoWayChannel(AsyncZMQSocketChannel):
    """A channel that is written to while somebody waits for what comes.

    ZeroMQ says once that a socket has something to read, and writing to the socket takes that word away: when
    nbclient answers an Output widget at the moment in which the cell's reply comes, the reply lies there and
    jupyter_client waits for it for ever.
    """

    answered: str | None = None
    """The id of the request that the last kernel_info_reply read here has answered."""

    async def get_msg(self, timeout: float | None = None) -> Message:
        """The next message. Raises queue.Empty if none comes within ``timeout`` seconds."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LOOK_SECONDS if give_up is None else max(0.0, give_up - time.monotonic())
            try:
                message: Message = await super().get_msg(timeout=min(LOOK_SECONDS, left))
                if message["msg_type"] == "kernel_info_reply":
                    self.answered = message["parent_header"].get("msg_id")
                return message
            except Empty:
                if left <= LOOK_SECONDS and give_up is not None:
                    raise


class PromptKernelClient(AsyncKernelClient):
    """What jupyter_client's does, sooner."""

    shell_channel_class = Type(TwoWayChannel)
    control_channel_class = Type(TwoWayChannel)

    receive_limit: int | None = None
    """Messages that may wait here; None for ZeroMQ's default, 0 for no limit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.session.unpack = _with_quick_dates(self.session.unpack)

    def _context_default(self) -> zmq.asyncio.Context:
        context: zmq.asyncio.Context = super()._context_default()
        # for the sockets that are made from it
        context.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
        if self.receive_limit is not None:
            context.setsockopt(zmq.RCVHWM, self.receive_limit)
        return context

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Until the kernel answers, on both channels that cells need. Raises RuntimeError.

        jupyter_client goes on to wait for 0.2 s without a message, so that a new client does not take for its
        own what an earlier one caused. Here messages are told apart by the request that they belong to.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        while True:
            self.kernel_info()
            try:
                reply = await self.shell_channel.get_msg(timeout=1)
                if reply["msg_type"] == "kernel_info_reply":
                    await self.iopub_channel.get_msg(timeout=0.2)
                    self._handle_kernel_info_reply(reply)
                    return
            except Empty:
                pass
            if not await ensure_async(self.is_alive()):
                raise RuntimeError("Kernel died before replying to kernel_info")
            if give_up is not None and time.monotonic() > give_up:
                raise RuntimeError(f"Kernel didn't respond in {timeout:g} seconds")


class UnlimitedKernelClient(PromptKernelClient):
    """For kernels that drop what its reader is too slow for: whatever has come is kept here."""

    receive_limit = 0


class MessageReader:
    """Reads the messages of a channel to which nothing is ever sent, as they come."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._socket = channel.socket
        self._direct: zmq.Socket[bytes] | None = None
        if isinstance(self._socket, zmq.asyncio.Socket):
            self._direct = zmq.Socket.shadow(self._socket)
        self._pause_at = 0.0

    async def next(self) -> Message:
        """The next message, however long that takes."""
        if self._direct is None:
            return dict(await ensure_async(self.channel.get_msg(timeout=None)))
        if time.monotonic() > self._pause_at:
            await asyncio.sleep(0)
            self._pause_at = time.monotonic() + READ_SECONDS
        message = _waiting(self._direct, self.channel.session)
        if message is not None:
            return message
        # get_msg would first ask whether there is one, through three more futures. As nothing is sent on this
        # channel, the word that one has come cannot be missed.
        parts = await self._socket.recv_multipart()
        self._pause_at = time.monotonic() + READ_SECONDS
        return _unpacked(parts, self.channel.session)


def _waiting(socket: zmq.Socket[bytes], session: Any) -> Message | None:
    """A message that has already come."""
    try:
        parts = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return _unpacked(parts, session)


def _unpacked(parts: list[bytes], session: Any) -> Message:
    _, parts = session.feed_identities(parts)
    message: Message = session.deserialize(parts)
    return message


def _with_quick_dates(unpack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``unpack``, with the date of a message's header as a datetime already.

    jupyter_client has dateutil guess at it, twice a message, for a fifth of the time that a message takes.
    """

    def unpacked(data: Any) -> Any:
        value = unpack(data)
        if isinstance(value, dict) and "msg_id" in value and isinstance(value.get("date"), str):
            with contextlib.suppress(ValueError):
                date = datetime.fromisoformat(value["date"])
                if date.tzinfo is not None:
                    value["date"] = date
        return value

    return unpacked

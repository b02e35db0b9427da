"""What a client of a kernel reads, when messages cross."""

import asyncio
import time
from queue import Empty

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from grd.execution.kernel_messages import PromptKernelClient


async def crossing(channel_class: type[AsyncZMQSocketChannel]) -> str:
    """A reply comes, and something is sent before the loop looks: what is then read."""
    context = zmq.asyncio.Context()
    session = Session(key=b"secret")
    kernel = zmq.Context.shadow(context).socket(zmq.ROUTER)
    socket = context.socket(zmq.DEALER)
    try:
        port = kernel.bind_to_random_port("tcp://127.0.0.1")
        socket.connect(f"tcp://127.0.0.1:{port}")
        channel = channel_class(socket, session)
        channel.send(session.msg("execute_request"))
        assert kernel.poll(10_000)
        identity, *_ = kernel.recv_multipart()
        reading = asyncio.ensure_future(channel.get_msg(timeout=None))
        for _ in range(5):
            await asyncio.sleep(0)
        session.send(kernel, "execute_reply", ident=identity)
        seen = zmq.Poller()
        seen.register(socket.getsockopt(zmq.FD), zmq.POLLIN)
        assert seen.poll(10_000)  # the socket says, once, that it has something
        give_up = time.monotonic() + 10
        while seen.poll(0) and time.monotonic() < give_up:  # looks once a millisecond
            channel.send(session.msg("comm_msg"))
        assert not seen.poll(0)
        async with asyncio.timeout(5):
            return str((await reading)["msg_type"])
    finally:
        kernel.close(0)
        socket.close(0)
        context.term()


@pytest.mark.parametrize("channel", ["shell", "control"])
def test_a_reply_that_crosses_with_something_sent_is_read(channel: str) -> None:
    client = PromptKernelClient()
    assert asyncio.run(crossing(getattr(client, f"{channel}_channel_class"))) == "execute_reply"


def test_a_channel_that_stays_silent_is_waited_for_as_long_as_asked() -> None:
    async def silent() -> float:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        try:
            began = time.monotonic()
            with pytest.raises(Empty):
                await PromptKernelClient().shell_channel_class(socket, Session()).get_msg(timeout=0.35)
            return time.monotonic() - began
        finally:
            socket.close(0)
            context.term()

    assert asyncio.run(silent()) >= 0.34

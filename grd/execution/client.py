"""The papermill client that grd executes with: outputs go to the journal, stops are honoured between cells.

Imports papermill at module level; only `attempt` imports this, when a notebook is about to run.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from jupyter_client.utils import ensure_async
from nbclient.exceptions import CellExecutionComplete, CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from papermill.engines import NotebookExecutionManager

from grd.execution import provisioner
from grd.execution.kernel_messages import MessageReader, PromptKernelClient, UnlimitedKernelClient
from grd.execution.notebooks import kernel_specs
from grd.execution.output_limit import Omission, OutputLimit, output_size
from grd.execution.saving import NotebookSaver
from grd.execution.starting import StartingClient
from grd.execution.stopping import Stopper
from grd.runs import notebook_journal as journal

IOPUB_TIMEOUT_SECONDS = 24 * 3600
"""Wait for the rest of a cell's output: papermill's 4 s fails healthy cells that print much. The deadline and
the kernel's death end this wait too."""

QUIET_SECONDS = 5.0
"""After a cell's reply: how long its output may be coming in before the kernel is asked whether it is."""

LOOK_SECONDS = 0.5
"""How often a cell that was interrupted and does not answer is looked at."""

INTERRUPTED_STATUS = "interrupted"
INTERRUPTING_ERRORS = ("ExperimentInterrupted", "KeyboardInterrupt")


class ManagedNotebook(NotebookExecutionManager):
    """papermill's bookkeeping of cell states, journalled instead of rewritten, and true at every end."""

    saver: NotebookSaver | None = None
    elsewhere = False
    """The output goes to a store, and what the saver writes is a copy of it."""
    on_cell: Any = None

    def save(self, **kwargs: Any) -> None:
        """Nothing: the saver writes."""

    def autosave_cell(self) -> None:
        """Nothing: the saver writes."""

    def put(self, entry: dict[str, Any]) -> None:
        """Hand one entry to the journal, where there is one."""
        if self.saver is not None:
            self.saver.put(entry)

    def put_cell(self, index: int) -> None:
        """Journal the state of one cell."""
        cell = self.nb.cells[index]
        entry = {"op": journal.CELL, "i": index, "metadata": dict(cell.metadata.papermill)}
        if cell.cell_type == "code":
            entry["execution_count"] = cell.execution_count
            if "execution" in cell.metadata:
                entry["execution"] = dict(cell.metadata.execution)
        self.put(entry)
        if self.on_cell is not None and cell.cell_type == "code":
            self.on_cell(index, cell.metadata.papermill["status"], len(self.nb.cells))

    def cell_start(self, cell: Any, cell_index: int | None = None, **kwargs: Any) -> None:
        """The cell was sent to the kernel."""
        super().cell_start(cell, cell_index, **kwargs)
        if cell_index is not None:
            self.put_cell(cell_index)

    def cell_complete(self, cell: Any, cell_index: int | None = None, **kwargs: Any) -> None:
        """The cell ended, however."""
        state = cell.metadata.papermill
        # papermill would have dateutil guess at what it has written itself.
        status, started = state["status"], state.pop("start_time", None)
        super().cell_complete(cell, cell_index, **kwargs)
        state["start_time"] = started
        if started is not None:
            took = datetime.fromisoformat(state["end_time"]) - datetime.fromisoformat(started)
            state["duration"] = took.total_seconds()
        if status == INTERRUPTED_STATUS:
            state["status"] = status
        if cell_index is not None:
            self.put_cell(cell_index)

    def cell_interrupted(self, cell: Any) -> None:
        """A stop ended the cell: neither completed nor failed by itself."""
        cell.metadata.papermill["exception"] = True
        cell.metadata.papermill["status"] = INTERRUPTED_STATUS

    def notebook_complete(self, **kwargs: Any) -> None:
        """Close the books without calling cells that never ran completed, as papermill does."""
        self.end_time = self.now()
        header = self.nb.metadata.papermill
        header["end_time"] = self.end_time.isoformat()
        if self.start_time is not None:
            header["duration"] = (self.end_time - self.start_time).total_seconds()
        if self.pbar is not None and not any(
            cell.metadata.papermill["status"] == self.PENDING for cell in self.nb.cells
        ):
            self.complete_pbar()
        self.cleanup_pbar()


class _RestOfOutput:
    """What nbclient awaits once it has the cell's reply, and not before."""

    def __init__(self, client: GrdNotebookClient, task: asyncio.Future[Any]) -> None:
        self._client, self._task = client, task

    def __await__(self) -> Any:
        return self._client.rest_of_output(self._task).__await__()


class GrdNotebookClient(StartingClient):
    """Executes the cells; stops between cells once asked, and never starts a cell after that."""

    def __init__(self, managed: ManagedNotebook, stopper: Stopper, limit: OutputLimit, **kwargs: Any) -> None:
        kwargs.setdefault("iopub_timeout", IOPUB_TIMEOUT_SECONDS)
        super().__init__(managed, stopper, **kwargs)
        self.managed = managed
        self.limit = limit
        self.lost_output = False
        self._questions: set[str] = set()
        self._reader: MessageReader | None = None
        self._replied = False
        self._asks_in_turn = False
        """Whether the kernel is known to answer its requests one after the other."""
        self.ran_all = False
        self.cell_error: CellExecutionError | None = None
        self.current_cell: int | None = None
        self.timed_out: int | None = None
        """The time limit in seconds that the current cell has reached."""

    def create_kernel_manager(self) -> Any:
        """Name our provisioner in the loaded spec, in memory, unless the spec has a remote one of its own."""
        manager = super().create_kernel_manager()
        manager.kernel_spec_manager = kernel_specs()
        spec = manager.kernel_spec
        named = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name", "local-provisioner")
        if named == "local-provisioner":
            spec.metadata["kernel_provisioner"] = {"provisioner_name": provisioner.NAME, "config": {}}
        # Other kernels drop what waits for us; an IPython kernel waits instead (kernel_outputs).
        self._asks_in_turn = waits = provisioner.is_ipykernel(spec.argv)
        manager.client_factory = PromptKernelClient if waits else UnlimitedKernelClient
        return manager

    def execute(self, **kwargs: Any) -> Any:
        """Start the kernel, run the cells, note what only the kernel knows, shut it down."""
        self.reset_execution_trackers()
        with self.setup_kernel(**kwargs):
            self.log.info(f"Executing notebook with kernel: {self.kernel_name}")
            try:
                self.papermill_execute_cells()
            finally:
                if self.popen is None or self.popen.poll() is None:
                    self.stopper.cells_over()
                    left = self.stopper.grace_left
                    if left is not None and hasattr(self.provisioner, "exit_seconds"):
                        # A thread may still be saving. Twice, since jupyter_client sends SIGTERM at half of
                        # it, and a second more, so that the stopper ends what outlasts the grace.
                        self.provisioner.exit_seconds = 2 * (left + 1)
            if not self.stopper.requested:
                self._ask_for_language()
            self.set_widgets_metadata()
        kept = {
            name: self.nb.metadata[name] for name in ("language_info", "widgets") if name in self.nb.metadata
        }
        self.managed.put({"op": journal.WIDGETS, "metadata": kept})
        return self.nb

    def _ask_for_language(self) -> None:
        """Note what the kernel says of its language. Raises DeadKernelError, unless its work was done."""
        try:
            info = self.wait_for_reply(self.kc.kernel_info())
        except DeadKernelError:
            if self.ran_all and self.popen is not None and self.popen.poll() == 0:
                return  # the last cell called exit(): papermill fails or not, whichever is faster
            raise
        if info is not None:
            self.nb.metadata["language_info"] = info["content"]["language_info"]

    def papermill_execute_cells(self) -> None:
        """Run the cells in order until an error, a stop, or the end."""
        for index, cell in enumerate(self.nb.cells):
            if self.stopper.requested:
                return
            is_code = cell.cell_type == "code" and bool(cell.source.strip())
            if is_code:
                self.current_cell = index
                self.timed_out = None
            self.managed.cell_start(cell, index)
            try:
                self.stopper.cell_started()
                try:
                    self.execute_cell(cell, index)
                finally:
                    self.stopper.cell_ended()
            except CellExecutionError as error:
                self.cell_error = error
                interrupted = error.ename in INTERRUPTING_ERRORS and self.timed_out is None
                if self.stopper.requested or interrupted:
                    self.managed.cell_interrupted(self.nb.cells[index])
                else:
                    self.managed.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
            except BaseException:
                if self.stopper.requested:
                    self.managed.cell_interrupted(self.nb.cells[index])
                else:
                    self.managed.cell_exception(self.nb.cells[index], cell_index=index)
                raise
            finally:
                self.managed.cell_complete(self.nb.cells[index], cell_index=index)
            if self.cell_error is not None:
                rest = self.nb.cells[index + 1 :]
                self.ran_all = not any(later.cell_type == "code" and later.source.strip() for later in rest)
                return
        self.ran_all = True

    async def _async_poll_for_reply(
        self, msg_id: str, cell: Any, timeout: int | None, rest_of_output: Any, kernel_alive: Any
    ) -> Any:
        """The cell's reply, once its output has all come or is known to be lost.

        Raises CellExecutionError if the kernel has dropped the cell: an interrupt between a request's arrival
        and its cell takes the request away from ipykernel, which then waits for the next.
        """
        self._replied = False
        rest = _RestOfOutput(self, rest_of_output)
        polling = asyncio.ensure_future(
            super()._async_poll_for_reply(msg_id, cell, timeout, rest, kernel_alive)
        )
        question: str | None = None
        try:
            while True:
                done, _ = await asyncio.wait({polling}, timeout=LOOK_SECONDS)
                if done:
                    return polling.result()
                if question is None:
                    if self._asks_in_turn and (self.stopper.interrupted or self.timed_out is not None):
                        question = await self._ask()
                elif self._answered == question and not self._replied:
                    kernel_alive.cancel()
                    lost_before = self.lost_output
                    await asyncio.wait({rest_of_output}, timeout=QUIET_SECONDS)
                    self.lost_output = lost_before
                    raise CellExecutionError("", "KeyboardInterrupt", "the cell had not begun")
        finally:
            polling.cancel()

    async def _ask(self) -> str:
        """Ask the kernel something that it answers after the cell; the id of the question."""
        assert self.kc is not None
        question = str(await ensure_async(self.kc.kernel_info()))
        self._questions.add(question)
        return question

    @property
    def _answered(self) -> str | None:
        """The last question to which the answer has come."""
        assert self.kc is not None
        return getattr(self.kc.shell_channel, "answered", None)

    async def _async_handle_timeout(self, timeout: int, cell: Any = None) -> Any:
        """Remember that the cell's own time limit, and nobody's stop, is why it is interrupted."""
        if cell is not None:
            self.timed_out = timeout
        return await super()._async_handle_timeout(timeout, cell)

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: Any, cell_index: int) -> None:
        """Read the cell's output until the kernel says that the cell, or a later question, is over."""
        assert self.kc is not None
        self._questions.clear()  # a late answer to one of an earlier cell says nothing of this one
        if self._reader is None or self._reader.channel is not self.kc.iopub_channel:
            self._reader = MessageReader(self.kc.iopub_channel)
        while True:
            message = await self._reader.next()
            parent = message["parent_header"].get("msg_id")
            if parent in self._questions and message["content"].get("execution_state") == "idle":
                self.lost_output = True
                return
            if parent == parent_msg_id:
                try:
                    self.process_message(message, cell, cell_index)
                except CellExecutionComplete:
                    return

    async def rest_of_output(self, task: asyncio.Future[Any]) -> None:
        """Wait for the end of a cell's output after its reply.

        A kernel that publishes faster than it is read may drop the message that says so. Its channel is in
        order: when it answers a question asked after the reply, nothing of the cell can come any more.
        """
        self._replied = True
        while True:
            done, _ = await asyncio.wait([task], timeout=QUIET_SECONDS)
            if done:
                await task
                return
            await self._ask()

    async def _check_raise_for_error(self, cell: Any, cell_index: int, exec_reply: Any) -> None:
        """A cell that the kernel says it aborted did not complete, whatever nbclient makes of it."""
        await super()._check_raise_for_error(cell, cell_index, exec_reply)
        status = exec_reply["content"].get("status") if exec_reply is not None else None
        if status in ("abort", "aborted"):
            raise CellExecutionError("", "KeyboardInterrupt", "the kernel aborted the cell")

    def output(self, outs: list[Any], msg: Any, display_id: str | None, cell_index: int) -> Any:
        """Append an output, in the notebook and in the journal."""
        waited = self.clear_before_next_output
        out = _printed(msg) if not waited and not self._has_hook(msg) else None
        if out is None:
            out = super().output(outs, msg, display_id, cell_index)
        else:
            outs.append(out)
        if waited and not self.clear_before_next_output:
            self._cleared(cell_index)
        if out is None:
            return None
        kept = outs.pop()
        if kept["output_type"] == "stream":
            text = self.limit.shortened(kept["text"])
            if text is not kept["text"]:
                kept = NotebookNode(kept, text=text)
        at = journal.append_output(outs, kept)
        self.managed.put({"op": journal.OUTPUT, "i": cell_index, "output": kept})
        for omission in self.limit.add(cell_index, at, output_size(kept)):
            self._leave_out(omission)
        return out

    def _has_hook(self, msg: Any) -> bool:
        """Whether an Output widget takes what comes."""
        return bool(self.output_hook_stack.get(msg["parent_header"].get("msg_id")))

    def _leave_out(self, omission: Omission) -> None:
        """Empty the place of an output, in the notebook and in the journal."""
        outputs = self.nb.cells[omission.cell].outputs
        if omission.at < len(outputs):
            outputs[omission.at] = NotebookNode(journal.omitted(omission.text))
        entry = {"op": journal.OMIT, "i": omission.cell, "at": omission.at, "text": omission.text}
        self.managed.put(entry)

    def _cleared(self, cell_index: int) -> None:
        self.limit.cleared(cell_index)
        self.managed.put({"op": journal.CLEAR, "i": cell_index})

    def clear_output(self, outs: list[Any], msg: Any, cell_index: int) -> None:
        """Clear a cell's outputs, in the notebook and in the journal."""
        had = len(outs)
        super().clear_output(outs, msg, cell_index)
        if had and not outs:
            self._cleared(cell_index)

    def _update_display_id(self, display_id: str, msg: Any) -> None:
        super()._update_display_id(display_id, msg)
        for cell_index, positions in self._display_id_map.get(display_id, {}).items():
            outputs = self.nb.cells[cell_index].outputs
            for position in positions:
                if position < len(outputs):
                    shown = outputs[position]
                    entry = {"op": journal.UPDATE, "i": cell_index, "at": position}
                    self.managed.put({**entry, "data": shown["data"], "metadata": shown["metadata"]})


def _printed(msg: Any) -> Any:
    """Printed text as the output that it becomes; None for anything else, or what breaks the format.

    nbformat holds each output against the schema of all of them, which takes longer than everything else
    that is done with a printed line.
    """
    content = msg["content"]
    if msg["msg_type"] != "stream" or content.get("name") not in ("stdout", "stderr"):
        return None
    text = content.get("text")
    return NotebookNode(output_type="stream", name=content["name"], text=text) if type(text) is str else None

"""``grd loop``: cycle after cycle of a plan, and looking at a loop, and ending it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from grd import contract
from grd.errors import UsageError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand, surface
from grd.interfaces.cli.rendering import say
from grd.settings import format_duration

ENDING_SECONDS = 60.0
"""Besides the grace of what it runs: until then ``--stop`` waits for the loop's end."""

LOOK_SECONDS = 0.1


@click.command(cls=AnsweringCommand)
@click.argument("plan", required=False)
@click.option(
    "--memory-path",
    metavar="DIR",
    help="What the loop remembers: state, events, log. Default: loops/NAME-OF-THE-PLAN in the project.",
)
@click.option(
    "--max-cycles",
    type=click.IntRange(0),
    metavar="N",
    help="End once N cycles are made, those of earlier starts included; 0 makes none. Default: no end.",
)
@click.option("--dry-run", is_flag=True, help="Check the plan and say what would be run; starts nothing.")
@click.option("--status", "look", is_flag=True, help="Only tell what the loop is doing.")
@click.option("--stop", "end", is_flag=True, help="Ask the loop to save and stop, and wait for its end.")
@click.option("--now", is_flag=True, help="With --stop: kill what it runs, without time to save.")
@click.option(
    "--wait/--detach",
    default=None,
    help="Run the loop here, or as a process of its own. Default: --wait, in %grd --detach.",
)
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@click.option("-q", "--quiet", is_flag=True, help="No messages on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def loop(
    plan: str | None,
    memory_path: str | None,
    max_cycles: int | None,
    dry_run: bool,
    look: bool,
    end: bool,
    now: bool,
    wait: bool | None,
    runs_dir: str | None,
    quiet: bool,
    as_json: bool,
) -> Answer:
    """Run the notebooks of PLAN (a YAML file), cycle after cycle.

    A cycle whose runs do not all complete is tried again after a growing pause and its runs are resumed;
    after three failed tries in a row the loop gives up. Ctrl-C, SIGTERM or --stop saves and stops (a second
    one, or --stop --now, kills); the same command goes on with the same cycle. A detached loop goes on
    whatever ends the shell; --status and --stop, typed in the same project, find it by its PLAN. Exit code:
    0 all cycles made, 1 gave up, 69 another loop has this memory, 75 stopped, 77 a person must agree to more
    time.

    \b
    A plan:
      prepare: [features.ipynb]          # of the next cycle, while this one trains
      notebooks:
        - notebook: train.ipynb
          parameters: {seed: "{cycle}"}  # {cycle} is the number of the cycle
          timeout: 1h
          max_attempts: 3
        - evaluate.ipynb
      pause: 10s
      cycle_timeout: 2h
      max_failures: 3

    \b
    Examples:
      grd loop plan.yaml --max-cycles 5 --dry-run
      grd loop plan.yaml --max-cycles 100
      grd loop plan.yaml --detach
      grd loop plan.yaml --stop
    """
    from grd.batch import loop as loops
    from grd.batch import loop_state

    if look and end:
        raise UsageError("--status or --stop, not both")
    if now and not end:
        raise UsageError("--now goes with --stop")
    if plan is None and memory_path is None:
        raise UsageError("name a PLAN, or --memory-path of one that was run; see: grd loop --help")
    memory = loop_state.LoopMemory(loops.memory_folder(memory_path, plan))
    if look:
        return _answer(loop_state.shown(memory), as_json)
    if end:
        return _answer(_stop(memory, now=now), as_json)
    waits = surface().waits if wait is None else wait
    if waits and not surface().prints and not dry_run:
        raise UsageError("a loop would keep this kernel busy until it ends: leave --wait away")
    made = loops.ContinuousResearchLoop(
        memory_path,
        max_cycles,
        dry_run,
        plan=plan,
        runs_dir=runs_dir,
        on_note=None if quiet else say,
    )
    if not waits and not dry_run:
        return _detach(made, as_json)
    ended = made.run()
    if dry_run:
        left = None if max_cycles is None else max(0, max_cycles - ended.cycles)
        document = {
            "schema": "grd.loop-dry-run/1",
            "plan": made.plan.origin,
            "cycles": ended.cycles,
            "to_make": left,
        }
        told = "cycles without an end" if left is None else f"{left} cycle{'' if left == 1 else 's'}"
        done = f", besides the {ended.cycles} that are made" if ended.cycles else ""
        lines = [
            f"{made.plan.origin} is sound: {told} would be made{done}",
            "whether somebody agreed to their time is looked up when each step starts; see: grd approvals",
        ]
        return Answer(document=document, lines=lines, as_json=as_json)
    return _answer(loop_state.shown(memory), as_json, exit_codes.of_loop(ended.reason))


def _detach(made: Any, as_json: bool) -> Answer:
    """Start it as a process of its own."""
    from grd.batch import loop_state
    from grd.batch.loop_detached import start_detached

    process = start_detached(made)
    say(f"the loop runs as process {process.pid}; {made.memory.log} tells what it does")
    return _answer(loop_state.shown(made.memory), as_json)


def _stop(memory: Any, *, now: bool) -> dict[str, Any]:
    """Leave a request in its memory, and wait for its end. Raises ResourceUnavailable."""
    from grd.batch import loop_state

    told = loop_state.shown(memory)
    if told["state"] in (loop_state.ENDED, loop_state.LOST):
        say("no loop is running there")
        return loop_state.shown(memory) if _stop_runs(told, now=now) else told
    memory.ask_to_stop(now=now)
    give_up = time.monotonic() + ENDING_SECONDS
    while memory.is_held():
        if time.monotonic() > give_up:
            say("it is still ending; see: grd loop --status")
            break
        time.sleep(LOOK_SECONDS)
    return loop_state.shown(memory)


def _stop_runs(told: dict[str, Any], *, now: bool) -> bool:
    """Stop what a loop that was killed has left under way; whether there was anything."""
    from grd.runs.folder import RunFolder
    from grd.runs.stop_request import ask_to_stop
    from grd.steps.following import is_under_way

    cycles = [cycle for cycle in (told["current"], told["prepared"]) if cycle]
    entries = [entry for cycle in cycles for entry in cycle["steps"] if entry.get("folder")]
    going = [folder for entry in entries if is_under_way(folder := RunFolder(Path(entry["folder"])))]
    for folder in going:
        say(f"its run {folder.run_id} is asked to stop")
        ask_to_stop(folder, contract.STOPPED, at_once=now)
    give_up = time.monotonic() + ENDING_SECONDS
    while any(is_under_way(folder) for folder in going):
        if time.monotonic() > give_up:
            say("it is still ending; see: grd status")
            break
        time.sleep(LOOK_SECONDS)
    return bool(going)


def _answer(told: dict[str, Any], as_json: bool, code: int = exit_codes.OK) -> Answer:
    of = "" if told["max_cycles"] is None else f" of {told['max_cycles']}"
    because = f" ({told['reason']})" if told.get("reason") else ""
    lines = [f"loop {told['plan']}: {told['state']}{because}, {told['cycles']}{of} cycles completed"]
    if told.get("detail") and told["state"] == "ended":
        lines.append(f"  {told['detail']}")
    if told.get("next_at"):
        lines.append(f"  next        {told['next_at']}")
    if told["current"] is not None:
        current = told["current"]
        tries = f", try {current['tries']}" if current["tries"] > 1 else ""
        lines.append(f"  cycle       {current['cycle']}{tries}")
        lines += [
            f"    {entry['name']:<20} {entry['run_id'] or '-'}  {entry['state'] or ''}"
            for entry in current["steps"]
        ]
    for name, kept in told["timing"].items():
        share = "" if kept["share"] is None else f", {100 * kept['share']:.0f} %"
        mean = format_duration(max(0.1, kept["mean_seconds"]))
        lines.append(f"  time        {name}: {mean} a cycle over {kept['count']}{share}")
    lines.append(f"  memory      {told['memory_path']}")
    return Answer(document=told, lines=lines, as_json=as_json, code=code)

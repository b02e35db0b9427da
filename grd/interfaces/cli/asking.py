"""Asking a person at a terminal, or in a notebook's input line, whether a long run may start."""

from __future__ import annotations

import click

from grd.agreement.person import JUPYTER, who_can_answer
from grd.interfaces.cli.rendering import say
from grd.settings import format_duration
from grd.steps.agreeing import Question

PROMPT = "y (yes, this run), s (yes, this session), c (capped), n (no), or a time such as 2h: "


def ask(question: Question) -> str:
    """Show what is known and what a yes agrees to; the answer as it was typed, empty at an end of input."""
    for line in lines_of(question):
        say(line)
    return read_answer(PROMPT)


def read_answer(prompt: str) -> str:
    """What a person types after ``prompt``, empty at an end of input."""
    in_notebook = who_can_answer() == JUPYTER
    if not in_notebook:
        click.echo(f"grd: {prompt}", nl=False, err=True)  # stdout is for data
    try:
        return str(input(f"grd: {prompt}" if in_notebook else ""))
    except EOFError:
        click.echo("", err=True)
        return ""


def lines_of(question: Question) -> list[str]:
    """The question in lines."""
    about = "unknown" if question.seconds is None else f"about {format_duration(max(0.1, question.seconds))}"
    low = "" if question.low is None else f"{format_duration(max(0.1, question.low))} to "
    return [
        f"{question.notebook} may take long: {about} ({low}{format_duration(question.high)})",
        f"  from {question.basis}" if question.basis else "  no basis is known",
        f"  a yes agrees to {format_duration(question.proposed)} in all attempts of this run together,",
        "  for the session to 4h of this project's runs; capped it saves and stops after "
        f"{format_duration(question.otherwise)}",
    ]

"""Asking a person at a terminal, or in a notebook's input line, whether a long run may start."""

from __future__ import annotations

import click

from grd.agreement.person import JUPYTER, who_can_answer
from grd.interfaces.cli.rendering import say
from grd.settings import format_duration
from grd.steps.agreeing import SESSION_SECONDS, Question

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
    return [
        f"{question.notebook} may take long: {span_of(question)}",
        f"  {basis_of(question)}",
        f"  a yes agrees to {format_duration(question.proposed)} in all attempts of this run together,",
        f"  for the session to {format_duration(SESSION_SECONDS)} of this project's runs; capped it saves "
        f"and stops after {format_duration(question.otherwise)}",
    ]


def span_of(question: Question) -> str:
    """``about 2h (40m to 6h)``."""
    estimate = question.estimate
    about = "unknown" if estimate.seconds is None else f"about {format_duration(max(0.1, estimate.seconds))}"
    low = f"{format_duration(max(0.1, estimate.low))} to "
    return f"{about} ({low}{format_duration(question.high)})"


def basis_of(question: Question) -> str:
    """What the estimate was made from."""
    return f"from {question.estimate.basis}" if question.estimate.basis else "no basis is known"

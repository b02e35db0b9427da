"""What a call may give a tool: what the SDK would pass over or take for something else is refused.

The SDK's own model of arguments ignores unknown names, so that a misspelt timeout would be none, and takes
true for 1.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, get_args

from mcp.server.mcpserver.tools import Tool
from pydantic import ConfigDict, ValidationInfo, create_model, field_validator


def strict(tool: Callable[..., Any], **about: Any) -> Tool:
    """``tool`` for the SDK, which answers calls with unknown arguments, or with true or false for a number
    or a text, with an error that names them. ``about`` is as in the SDK's ``Tool.from_function``."""
    made = Tool.from_function(tool, **about)
    lenient = made.fn_metadata.arg_model
    truths = {name for name, field in lenient.model_fields.items() if _has_truth(field.annotation)}

    def refuse_truths(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in truths:
            raise ValueError(f"{info.field_name} is not a matter of true or false")
        return value

    forbidding = type(lenient)(
        f"{lenient.__name__}Strict",
        (lenient,),
        {"__module__": __name__, "model_config": ConfigDict(extra="forbid")},
    )
    made.fn_metadata.arg_model = create_model(
        lenient.__name__,
        __base__=forbidding,
        __validators__={"refuse_truths": field_validator("*", mode="before")(refuse_truths)},
    )
    made.parameters = made.fn_metadata.arg_model.model_json_schema(by_alias=True)
    return made


def _has_truth(annotation: Any) -> bool:
    """Whether a field of this type may be true or false."""
    if isinstance(annotation, types.UnionType):
        return any(_has_truth(each) for each in get_args(annotation))
    return annotation is bool

"""The response formats and tools of a request, in the form of the OpenAI API and of vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field

from dsvl_export.serving.errors import RequestError
from runtimes.errors import UserError
from runtimes.structured.response_format import ResponseFormat

MAX_TOOLS = 64
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CALL_PLACE = re.compile(r"/anyOf/(\d+)/properties/arguments")
INSTRUCTION = (
    "You can call functions. To call one, answer only with JSON of this form:"
    ' {"name": "NAME", "arguments": {…}}. The functions, one in each line:'
)


class Fields(BaseModel):
    """An object of a request; other fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Fields):
    """A JSON Schema; answers follow it with and without ``strict``."""

    name: Optional[str] = None
    description: Optional[str] = None
    schema_: Union[bool, dict[str, Any]] = Field(True, alias="schema")
    strict: Optional[bool] = None


class JsonSchemaFormat(Fields):
    """JSON that is valid under a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


AnyFormat = Annotated[Union[TextFormat, JsonObjectFormat, JsonSchemaFormat], Field(discriminator="type")]


class StructuredOutputs(Fields):
    """vLLM's form of a response format: one of the fields."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    json_: Union[bool, dict[str, Any], None] = Field(None, alias="json")
    regex: Optional[str] = None
    choice: Optional[list[str]] = None
    grammar: Optional[str] = None
    json_object: Optional[bool] = None


class FunctionDescription(Fields):
    """A function that the model can call."""

    name: Name
    description: Optional[str] = None
    parameters: Union[dict[str, Any], None] = None
    strict: Optional[bool] = None


class Tool(Fields):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionDescription


class NamedFunction(Fields):
    """The name of a function."""

    name: Name


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Union[Literal["none", "auto", "required"], NamedTool]


class CalledFunction(Fields):
    """A call of a function; the arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(Fields):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def text(self) -> str:
        """The call as the model writes it."""
        name = json.dumps(self.function.name, ensure_ascii=False)
        return f'{{"name": {name}, "arguments": {self.function.arguments}}}'


def read_format(response_format: Any, outputs: StructuredOutputs | None) -> ResponseFormat | None:
    """Return the response format of a request; None if any text is allowed.

    Args:
        response_format: the parameter ``response_format``.
        outputs: the parameter ``structured_outputs``.

    Raises:
        RequestError: there are two formats, or one is too large.
    """
    given = outputs.model_dump(by_alias=True, exclude_none=True) if outputs else {}
    if isinstance(response_format, TextFormat):
        response_format = None
    if len(given) + (response_format is not None) > 1:
        raise RequestError(
            400, "The request has more than one response format; pass one.", param="response_format"
        )
    param = "structured_outputs" if given else "response_format"
    makers: dict[str, Any] = {
        "json": ResponseFormat.json_schema,
        "regex": ResponseFormat.regex,
        "choice": ResponseFormat.choices,
        "grammar": ResponseFormat.lark,
        "json_object": lambda wanted: ResponseFormat.json_object() if wanted else None,
    }
    try:
        if given:
            ((kind, value),) = given.items()
            made: ResponseFormat | None = makers[kind](value)
            return made
        if isinstance(response_format, JsonSchemaFormat):
            return ResponseFormat.json_schema(response_format.json_schema.schema_)
        return ResponseFormat.json_object() if isinstance(response_format, JsonObjectFormat) else None
    except UserError as error:
        raise RequestError(400, str(error), param=param) from error


def callable_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """Return the tools that the answer may call.

    Raises:
        RequestError: two tools have one name, or the chosen one does not exist.
    """
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError(400, "Two tools have the same name.", param="tools")
    if choice == "none":
        return []
    if isinstance(choice, NamedTool):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            message = f"tool_choice names no tool of the request: {choice.function.name}."
            raise RequestError(400, message, param="tool_choice")
        return chosen
    if choice == "required" and not tools:
        raise RequestError(400, "tool_choice is required, but the request has no tools.", param="tool_choice")
    return list(tools)


def tools_format(tools: Sequence[Tool], choice: ToolChoice | None) -> ResponseFormat:
    """Return the format of an answer that calls a tool, or may call one.

    Raises:
        RequestError: the parameters of a tool are too large.
    """
    calls = []
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters or {"type": "object"}
        place = f"#/anyOf/{index}/properties/arguments"
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": _moved(parameters, place),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = {"anyOf": calls}
    try:
        if choice in (None, "auto"):
            return ResponseFormat.text_or_json(schema)
        return ResponseFormat.json_schema(schema)
    except UserError as error:
        raise RequestError(400, str(error), param="tools") from error


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references are right when it is at a place of another schema."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/"))
            else value
            if key in ("const", "enum", "default", "examples")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


def name_parameters(message: str) -> str:
    """Return an error of a format with the client's names of the places in its tools."""
    return CALL_PLACE.sub(r"tools.\1.function.parameters", message)


def tools_text(tools: Sequence[Tool]) -> str:
    """Return what a prompt says of the tools."""
    described = [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]
    return "\n".join([INSTRUCTION, *(json.dumps(item, ensure_ascii=False) for item in described)])

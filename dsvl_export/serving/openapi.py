"""The OpenAPI document of the server, at ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsvl_export.serving.parameters import IGNORED, NEUTRAL
from dsvl_export.serving.protocol import ChatRequest
from dsvl_export.version import __version__

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def openapi_document(names: Sequence[str], token: bool) -> Schema:
    """Return the OpenAPI document of all routes.

    Args:
        names: names of the models.
        token: whether the guarded routes require a bearer token.
    """
    security: list[Schema] = [{"bearer": []}] if token else []
    schemes = {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if token else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsvl-export", "version": __version__},
        "paths": {
            "/": {"get": _operation("The web page", "text/html", STRING)},
            "/healthz": {
                "get": _operation(
                    "Health: 503 if the server cannot answer requests", "application/json", _ref("Health"),
                    {"503": _response("Cannot answer requests", "application/json", _ref("Unavailable"))},
                )
            },
            "/metrics": {
                "get": {**_operation("Metrics for Prometheus", "text/plain", STRING), "security": security}
            },
            "/v1/models": {
                "get": {**_operation("Models", "application/json", _ref("Models")), "security": security}
            },
            "/v1/models/{name}": {
                "get": {
                    **_operation("One model", "application/json", _ref("Model")),
                    "parameters": [
                        {"name": "name", "in": "path", "required": True, "schema": {"enum": list(names)}}
                    ],
                    "security": security,
                }
            },
            "/v1/chat/completions": {"post": {**_chat(), "security": security}},
        },
        "components": {"schemas": {**_request_schemas(), **_answer_schemas()}, **schemes},
    }  # fmt: skip


def _chat() -> Schema:
    """Return the operation of chat completions."""
    operation = _operation("Answer a conversation", "application/json", _ref("Completion"))
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {
            **STRING,
            "description": "With stream: chunks or an error as events, then [DONE].",
        }
    }
    body = {"application/json": {"schema": _ref("ChatRequest")}}
    return {**operation, "requestBody": {"required": True, "content": body}}


def _operation(summary: str, media_type: str, schema: Schema, more: Schema | None = None) -> Schema:
    error = _response("An error", "application/json", _ref("Error"))
    answer = _response(summary, media_type, schema)
    return {"summary": summary, "responses": {"200": answer, "4XX": error, "5XX": error, **(more or {})}}


def _response(description: str, media_type: str, schema: Schema) -> Schema:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(model=name)}


def _request_schemas() -> Schema:
    """Return the schemas of requests, with the ignored parameters and those of one value."""
    schema = ChatRequest.model_json_schema(ref_template=REF)
    schemas: Schema = schema.pop("$defs")
    ignored: Schema = {name: {"description": "Ignored."} for name in sorted(IGNORED)}
    fixed = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    schema["properties"] = {**schema["properties"], **ignored, **fixed}
    schema["additionalProperties"] = False
    schema["description"] = (
        "The last message must be the user's; images are data URLs, or URLs of allowed hosts."
    )
    # Only an earlier answer can have no content, if it was interrupted.
    answer = {"properties": {"role": {"const": "assistant"}}}
    content = {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}}
    schemas["ChatMessage"] |= {"if": answer, "else": content}
    return {**schemas, "ChatRequest": schema}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _answer_schemas() -> Schema:
    """Return the schemas of responses."""
    entry = {"token": STRING, "logprob": {"type": "number"}, "bytes": _or_null(_array(COUNT))}
    logprobs = _object(
        content=_array(_object(**entry, top_logprobs=_array(_object(**entry)))), refusal=_or_null(STRING)
    )
    message = _object(role={"const": "assistant"}, content=_or_null(STRING), refusal={"type": "null"})
    function = _object(name=STRING, arguments=STRING)
    call = _object(id=STRING, type={"const": "function"}, function=function)
    message["properties"]["tool_calls"] = _array(call)  # only if a tool is called
    reasons = {"enum": ["stop", "length", "tool_calls"]}
    choice = _object(index=COUNT, message=message, logprobs=_or_null(logprobs), finish_reason=reasons)
    usage = _object(
        prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
    )  # fmt: skip
    model = _object(
        id=STRING, object={"const": "model"}, created=COUNT, owned_by=STRING, backend=STRING,
        precision=STRING, default={"type": "boolean"}, open={"type": "boolean"},
    )  # fmt: skip
    error = _object(message=STRING, type=STRING, param=_or_null(STRING), code=_or_null(STRING))
    return {
        "Error": _object(error=error),
        "Health": _object(status={"const": "ok"}, models=_array(STRING)),
        "Unavailable": _object(status={"const": "unavailable"}, detail=STRING),
        "Model": model,
        "Models": _object(object={"const": "list"}, data=_array(_ref("Model"))),
        "Completion": _object(
            id=STRING, object={"const": "chat.completion"}, created=COUNT, model=STRING,
            choices=_array(choice), usage=usage,
        ),
    }  # fmt: skip

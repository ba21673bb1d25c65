"""What a model would have to think of: a call of a tool, and an object that a JSON schema allows. The least of each."""

from __future__ import annotations

import json
from typing import Any

from .answers import Json


def tool_call(body: Json) -> tuple[str, str] | None:
    """Name and arguments of the call that the request demands; None where it leaves the choice, and text is the answer."""
    choice, tools = body.get("tool_choice"), body.get("tools") or []
    if not tools or not (choice == "required" or isinstance(choice, dict)):
        return None
    wanted = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == wanted)
    return wanted, json.dumps(minimal(function.get("parameters") or {}))


def structured(body: Json) -> str | None:
    """The text that `response_format` asks for, None where it asks for none."""
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_object":
        return "{}"
    return json.dumps(minimal(asked["json_schema"]["schema"])) if asked.get("type") == "json_schema" else None


def minimal(schema: Json, root: Json | None = None) -> Any:
    """A value that the schema allows: its required fields, in their least values."""
    root = schema if root is None else root
    if "$ref" in schema:
        return minimal(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for options in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        if options:
            return minimal(options[0], root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    match schema.get("type", "object"):
        case "object":
            fields = schema.get("properties", {})
            return {name: minimal(fields.get(name, {"type": "string"}), root) for name in schema.get("required", [])}
        case "array":
            return [minimal(schema.get("items", {}), root)] * schema.get("minItems", 0)
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case "null":
            return None
    return "x" * schema.get("minLength", 1)

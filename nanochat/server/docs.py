"""GET /docs: the OpenAPI description as a plain page, without scripts and without files from other hosts."""

import base64
import hashlib
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.6 system-ui, sans-serif; }
h2 { margin-top: 3rem; } code { font-family: ui-monospace, monospace; font-size: .92em; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; }
tr + tr { border-top: 1px solid #8884; }
"""
HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{HASH}'; frame-ancestors 'none'"


def page(description: dict[str, Any]) -> str:
    """Return the HTML page of an OpenAPI description."""
    info, schemas = description["info"], description["components"]["schemas"]
    parts = [f"<h1>{escape(info['title'])}</h1><p>{escape(info.get('description', ''))}</p>"]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description", operation["summary"])
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(text)}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if body:
                parts.append(_fields(schemas[body["$ref"].split("/")[-1]]))
            responses = "".join(f"<tr><td><code>{status}</code></td><td>{escape(response['description'])}</td></tr>"
                                for status, response in operation["responses"].items())
            parts.append(f"<table>{responses}</table>")
    for name in ("Message", "Part"):
        about = escape(schemas[name].get("description", ""))
        parts.append(f"<h2><code>{name}</code></h2><p>{about}</p>{_fields(schemas[name])}")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>")


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        needed = " (required)" if name in schema.get("required", ()) else ""
        rows.append(f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(_type(field))}</code></td>"
                    f"<td>{escape(field.get('description', ''))}{needed}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "$ref" in schema:
        return schema["$ref"].split("/")[-1]
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"[{_type(schema['items'])}]"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema and abs(schema[name]) < 1e9]
    return f"{schema.get('type', 'any')} {' '.join(bounds)}".strip()

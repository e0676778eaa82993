"""`/docs`: the OpenAPI document as one plain page that needs nothing but this server.

Swagger UI fetches its scripts from a public network; a scorer often stands where there is none, and a page that tells
operators about it should not run other people's code. `/openapi.json` is there for every tool that reads it.
"""

import json
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
pre{{background:#8881;padding:.8rem;overflow:auto;font-size:.85rem}}code{{font-size:.95em}}
h2{{border-top:1px solid #8884;padding-top:1rem}}</style>
<h1>{title} <small>{version}</small></h1><p>Machine-readable: <a href="openapi.json">openapi.json</a></p>
"""
_EXAMPLES = {
    "/v1/rank": '{"user_id": "u1", "candidates": ["a", "b"], "tasks": ["click"], "k": 10}',
    "/v1/retrieve": '{"user_id": "u1", "k": 10, "exclude_seen": true}',
}


def page(document: dict[str, Any]) -> str:
    """HTML for an OpenAPI document."""
    info = document["info"]
    parts = [_HEAD.format(title=escape(info["title"]), version=escape(info["version"]))]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            if path in _EXAMPLES:
                command = (
                    f"curl -s localhost:8080{path} -H 'content-type: application/json' \\\n  -d '{_EXAMPLES[path]}'"
                )
                parts.append(f"<pre>{escape(command)}</pre>")
            answers = (
                f"<li><code>{code}</code> {escape(a['description'])}" for code, a in operation["responses"].items()
            )
            parts.append(f"<ul>{''.join(answers)}</ul>")
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<h3 id='{escape(name)}'>{escape(name)}</h3><pre>{escape(json.dumps(schema, indent=2))}</pre>")
    return "\n".join(parts)

"""`/openapi.json`, and `/docs`: the same for people, one page that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

from aiohttp import web

from tgi_server.http.answers import json_response
from tgi_server.http.openapi import document
from tgi_server.http.state import CONFIG, VERSION

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h2{border-top:1px solid #8884;padding-top:1rem}code,pre{font-family:ui-monospace,monospace}"
    "pre{overflow:auto;background:#8881;padding:.7rem}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
    ":root{color-scheme:light dark}"
)


async def get_openapi(request: web.Request) -> web.Response:
    return json_response(document(request.app[CONFIG], request.app[VERSION]))


async def get_docs(request: web.Request) -> web.Response:
    page = "".join(_page(document(request.app[CONFIG], request.app[VERSION])))
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return web.Response(text=page, content_type="text/html", headers=headers)


def _page(api: dict[str, Any]) -> Iterable[str]:
    yield f"<!doctype html><meta charset=utf-8><title>{escape(api['info']['title'])}</title><style>{_STYLE}</style>"
    yield f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>"
    yield f"<p>{escape(api['info']['description'])} <a href=openapi.json>openapi.json</a></p>"
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['summary'])}</p>"
            if body := route.get("requestBody"):
                yield from _body(body["content"]["application/json"]["schema"], api["components"]["schemas"])
            yield "<table>"
            for status, response in route["responses"].items():
                kinds = ", ".join(response.get("content", {}))
                yield f"<tr><td>{status}<td>{escape(response['description'])}<td>{escape(kinds)}"
            yield "</table>"
    yield "<h1>Schemas</h1>"
    for name, schema in api["components"]["schemas"].items():
        yield f"<h2 id={escape(name)}>{escape(name)}</h2><pre>{escape(json.dumps(schema, indent=1))}</pre>"


def _body(schema: dict[str, Any], schemas: dict[str, Any]) -> Iterable[str]:
    name = schema["$ref"].rsplit("/", 1)[1]
    fields = ", ".join(schemas[name].get("properties", {}))
    yield f"<p>Body: <a href=#{escape(name)}>{escape(name)}</a> {escape(f'({fields})' if fields else '')}</p>"

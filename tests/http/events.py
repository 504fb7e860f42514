"""Reading server-sent events."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import ClientResponse


async def read_events(response: ClientResponse) -> list[Any]:
    """Every event's JSON; `[DONE]` as that string. Comments are left out."""
    assert response.content_type == "text/event-stream"
    body = (await response.read()).decode()
    events = [block for block in body.split("\n\n") if block and not block.startswith(":")]
    return [parse(event) for event in events]


def parse(event: str) -> Any:
    assert event.startswith("data: ")
    data = event.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine

Say = Callable[..., FakeEngine]
ASK = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}


@pytest.mark.parametrize(
    ("allowed", "named"),
    [
        ((), None),
        (("https://page.example",), "https://page.example"),
        (("*",), "*"),
        (("https://other",), None),
    ],
)
async def test_only_pages_of_allowed_origins_may_call(
    start: Start, say: Say, allowed: tuple[str, ...], named: str | None
) -> None:
    client = await start(say("a"), cors_allow_origin=allowed, api_keys=("right",))
    preflight = await client.options("/generate", headers=ASK)
    assert preflight.status == (204 if named else 401)
    assert preflight.headers.get("Access-Control-Allow-Origin") == named
    answer = await client.post("/generate", json={"inputs": "x"}, headers={"Origin": ASK["Origin"]})
    assert answer.status == 401, "a preflight opens nothing"
    assert answer.headers.get("Access-Control-Allow-Origin") == named
    assert "Access-Control-Allow-Credentials" not in {**preflight.headers, **answer.headers}


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ("authorization,content-type,x-stainless-lang", "authorization,content-type,x-stainless-lang"),
        ("a\xe9", "authorization, content-type, x-request-id"),
        (None, "authorization, content-type, x-request-id"),
    ],
)
async def test_an_sdk_in_a_page_may_send_the_headers_it_needs(
    start: Start, say: Say, asked: str | None, granted: str
) -> None:
    client = await start(say("a"), cors_allow_origin=("*",))
    headers = ASK if asked is None else {**ASK, "Access-Control-Request-Headers": asked}
    preflight = await client.options("/v1/chat/completions", headers=headers)
    assert preflight.headers["Access-Control-Allow-Headers"] == granted

"""Who may find whose prompts in the cache: the same key, or the same `cache_salt`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tgi_server.http.parameters import MAX_SALT_CHARS

Say = Callable[..., FakeEngine]

MESSAGES = [{"role": "user", "content": "hello"}]


def bodies(**fields: object) -> list[tuple[str, dict[str, object]]]:
    """A request for each route that generates, with the same fields."""
    native: dict[str, object] = {"inputs": "x", "parameters": fields}
    return [
        ("/generate", native),
        ("/generate_stream", native),
        ("/", native),
        ("/invocations", native),
        ("/vertex", {"instances": [native]}),
        ("/v1/completions", {"prompt": "x", **fields}),
        ("/v1/chat/completions", {"messages": MESSAGES, **fields}),
    ]


async def salts(start: Start, say: Say, key: str, **fields: object) -> set[str]:
    """What requests of every flavour, with this key, are salted with."""
    engine = say("a")
    client = await start(engine, api_keys=("alice-key", "bob-key"), admin_keys=("boss-key",))
    for path, body in bodies(**fields):
        response = await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
        assert response.status == 200, await response.text()
        assert "x-tgi-ignored-fields" not in response.headers
    assert len(engine.requests) == len(bodies())
    return {request.salt for request in engine.requests}


async def test_two_keys_share_nothing_and_one_key_shares_in_every_flavour(start: Start, say: Say) -> None:
    found = [await salts(start, say, key) for key in ("alice-key", "bob-key", "boss-key")]
    assert all(len(one) == 1 for one in found), "one key, one salt"
    assert len(set.union(*found)) == 3
    assert not any("key" in salt.removeprefix("key:") for salt in set.union(*found)), "the keys do not travel"


async def test_a_salt_of_ones_own_is_shared_with_those_that_send_the_same(start: Start, say: Say) -> None:
    alice = await salts(start, say, "alice-key", cache_salt="our secret")
    assert alice == await salts(start, say, "bob-key", cache_salt="our secret")
    assert len(alice) == 1
    assert alice != await salts(start, say, "alice-key")
    assert alice != await salts(start, say, "alice-key", cache_salt="another")


async def test_nobody_gets_at_a_keys_prompts_by_sending_its_salt(start: Start, say: Say) -> None:
    (alice,) = await salts(start, say, "alice-key")
    for guess in (alice, alice.removeprefix("key:")):
        assert alice not in await salts(start, say, "bob-key", cache_salt=guess)


async def test_without_keys_all_share_unless_they_send_a_salt(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    for fields in ({}, {"cache_salt": None}, {"cache_salt": "s"}):
        for path, body in bodies(**fields):
            assert (await client.post(path, json=body)).status == 200
    found = [request.salt for request in engine.requests]
    assert found == [""] * 14 + ["salt:s"] * 7


@pytest.mark.parametrize("salt", ["", "s" * (MAX_SALT_CHARS + 1), 5, ["a"], True])
async def test_what_is_no_salt_is_refused_by_name(start: Start, say: Say, salt: object) -> None:
    engine = say("a")
    client = await start(engine)
    for path, body in bodies(cache_salt=salt):
        response = await client.post(path, json=body)
        if path == "/vertex":
            assert "cache_salt" in await response.text()
        else:
            assert response.status == (400 if path.startswith("/v1/") else 422)
            assert "cache_salt" in await response.text()
    assert not engine.requests

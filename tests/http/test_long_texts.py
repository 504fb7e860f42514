from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tests.http.test_streams import until
from tgi_server.text.tokenizer import Tokenizer

Say = Callable[..., FakeEngine]
LONG = {"inputs": "x" * 60_000, "parameters": {"truncate": 5}}
SHORTER = {
    "inputs": "x" * 3_000,
    "parameters": {"truncate": 5},
}  # still too long for the event loop's own thread


class Gate:
    """Long texts are not encoded before it opens."""

    def __init__(self) -> None:
        self.arrived = 0
        self.opened = threading.Event()

    def wait(self) -> None:
        self.arrived += 1
        assert self.opened.wait(30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    encode = Tokenizer.encode_batch

    def waiting(self: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        if len(texts[0]) == len(str(LONG["inputs"])):
            gate.wait()
        return encode(self, texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", waiting)
    yield gate
    gate.opened.set()


async def test_long_texts_take_turns_and_keep_no_other_waiting(start: Start, say: Say, gate: Gate) -> None:
    client = await start(say("hello"), max_queue=40)
    crowd = [asyncio.create_task(client.post("/generate", json=LONG)) for _ in range(40)]
    await until(lambda: gate.arrived == 1)
    for body in (SHORTER, {"inputs": "x"}):
        assert (await asyncio.wait_for(client.post("/generate", json=body), 10)).status == 200
    assert gate.arrived == 1
    gate.opened.set()
    assert {(await one).status for one in crowd} == {200}


async def test_no_more_long_texts_wait_than_requests_may(start: Start, say: Say, gate: Gate) -> None:
    client = await start(say("hello"), max_queue=5)
    crowd = [asyncio.create_task(client.post("/generate", json=LONG)) for _ in range(8)]
    refused = []
    for one in asyncio.as_completed(crowd):
        refused.append(await one)
        if len(refused) == 3:
            break
    assert {response.status for response in refused} == {429}
    assert (await refused[0].json())["error"] == "5 long texts wait to be encoded, the limit; try again later"
    gate.opened.set()
    assert sorted([(await one).status for one in crowd]) == [200] * 5 + [429] * 3


async def test_a_client_that_leaves_takes_its_text_out_of_the_queue(
    start: Start, say: Say, gate: Gate
) -> None:
    client = await start(say("hello"), max_queue=20)
    first = asyncio.create_task(client.post("/generate", json=LONG))
    await until(lambda: gate.arrived == 1)
    leaving = [asyncio.create_task(client.post("/generate", json=LONG)) for _ in range(9)]
    await asyncio.sleep(0.2)
    for one in leaving:
        one.cancel()
    await asyncio.sleep(0.2)
    gate.opened.set()
    assert (await first).status == 200
    assert (await client.post("/generate", json=LONG)).status == 200
    assert gate.arrived == 2

"""`tgi-server bench`: its arithmetic by hand, its client against a server that is told what to say, and a real one."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.server import DEMO, ROOT
from tgi_server import cli
from tgi_server.bench.figures import Case, Spread, as_json, table
from tgi_server.bench.load import Run, Server, Shape, open_session, run_batch, served_model
from tgi_server.errors import StartupError

TWO = Run(Shape(2, 10, 3), [[1.0, 2.0, 3.0], [2.0, 3.5, 5.0]])


def test_a_run_is_prefill_until_the_last_first_token_and_decode_after_it() -> None:
    assert TWO.prefill_s == 2.0
    assert TWO.prefill_rate == 20 / 2.0
    assert TWO.token_s == [1.0, 1.5]
    assert TWO.decode_rate == 3 / 3.0  # 3.0, 3.5 and 5.0 came within the three seconds after 2.0
    assert TWO.whole_s == 5.0


def test_percentiles_are_values_that_were_measured() -> None:
    assert Spread.of([float(i) for i in range(100, 0, -1)]) == Spread(50.5, 1, 100, 50, 90, 99)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7, 7)


def test_the_table_has_a_line_for_each_step_and_batch_and_is_markdown() -> None:
    case = Case.of([TWO, TWO])
    lines = table([case]).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["prefill", "2", *["2000.00"] * 6, "10.0"]
    assert cells[3][:6] == ["decode, a token", "2", "1250.00", "1000.00", "1500.00", "1000.00"]
    assert cells[4] == ["whole answer", "2", *["5000.00"] * 6, "-"]


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    case = Case.of([Run(Shape(1, 10, 1), [[1.0]])])
    assert case.decode_token_ms is None and case.decode_tokens_per_s is None
    assert "| decode, a token |     1 |       - |" in table([case])
    assert json.loads(json.dumps(as_json([case], model="m")))["cases"][0]["decode_token_ms"] is None


class Fake:
    """A server of completions: `lines` are its events, `status` its answer to POST."""

    def __init__(self, lines: list[str], status: int = 200) -> None:
        self.lines = lines
        self.status = status
        self.bodies: list[Mapping[str, Any]] = []
        self.keys: list[str | None] = []

    async def models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": "its-name"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self.status != 200:
            return web.json_response({"error": {"message": "the queue is full"}}, status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        for line in self.lines:
            await response.write(line.encode() + b"\n\n")
        return response


async def run(fake: Fake, shape: Shape, **sampling: float) -> Run:
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/completions", fake.completions)
    async with TestServer(app) as server, open_session("secret") as session:
        url = str(server.make_url("")).rstrip("/")
        name = await served_model(session, url)
        return await run_batch(session, Server(url, name, sampling), shape, random.Random(0))


def event(*token_ids: int) -> str:
    ids = {"token_ids": list(token_ids)} if token_ids else {}
    return "data: " + json.dumps({"choices": [{"text": "x", **ids}]})


async def test_each_request_has_a_prompt_of_its_own_of_exactly_the_length_and_an_answer_that_goes_on() -> (
    None
):
    fake = Fake([event(5), event(6, 7), "data: [DONE]"])
    got = await run(fake, Shape(3, 20, 3), temperature=0.5)
    assert [len(times) for times in got.tokens_s] == [3, 3, 3]
    assert all(times[1] == times[2] for times in got.tokens_s), "tokens of one event came at one time"
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 3
    for body in fake.bodies:
        assert len(body["prompt"]) == 20
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("its-name", 3, True)
        assert (body["stream"], body["temperature"]) == (True, 0.5)
    assert fake.keys == ["Bearer secret"]


async def test_a_server_that_lists_no_ids_sends_a_token_an_event() -> None:
    got = await run(Fake([event(), event(), 'data: {"choices": []}', "data: [DONE]"]), Shape(1, 5, 2))
    assert len(got.tokens_s[0]) == 2


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (Fake([], status=429), "the server answers 429: the queue is full"),
        (Fake([event(1)]), "an answer of 2 tokens was asked for, one of 1 came"),
        (Fake([event(1), 'data: {"error": "out of luck"}']), "an answer broke off: out of luck"),
        (Fake(['data: {"choices": 3}']), "none of OpenAI's completions"),
    ],
)
async def test_what_goes_wrong_is_said_in_the_servers_words(fake: Fake, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        await run(fake, Shape(1, 5, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give a model, or a running server as --url"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["/nowhere/at-all"], "before it was ready"),
    ],
)
def test_nothing_to_measure_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--batch-size=0", "--runs=0", "--decode-length=x", "--temperature=warm", "--sequence-length=-1"],
)
def test_a_benchmark_that_cannot_be_is_refused_by_its_options_name(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--url", "http://127.0.0.1:9", option])
    assert option.split("=", maxsplit=1)[0] in capsys.readouterr().err


def test_a_model_is_served_measured_and_let_go(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "tgi_server.cli", "bench", str(DEMO), "-b", "2", "-b", "1", "-s", "17", "-d", "5",
        "-r", "2", "--json", str(file), "--max-total-tokens", "64",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\| prefill +\| +(\d)", done.stdout, re.MULTILINE) == ["1", "2"]
    figures = json.loads(file.read_text())
    assert (figures["model"], figures["sequence_length"], figures["decode_length"]) == (DEMO.name, 17, 5)
    for case, batch in zip(figures["cases"], (1, 2), strict=True):
        assert (case["batch_size"], case["runs"]) == (batch, 2)
        for spread in (case["prefill_ms"], case["decode_token_ms"], case["whole_ms"]):
            assert 0 < spread["lowest"] <= spread["p50"] <= spread["p99"] <= spread["highest"]
        assert case["whole_ms"]["mean"] > case["prefill_ms"]["mean"]

"""Servers with keys, and with templates of another kind. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.faults.conftest import CHAT, MESSAGES, Baseline, Target, attack, check_error, survived
from tests.server import DEMO
from tgi_server.http.keys import ACCESS, Access

USER, ADMIN, FRIEND = "a-users-key", "the-boss", "https://friend.example"
RAISING = "{{ raise_exception('these\x1b messages please nobody') }}"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Baseline]]:
    template = tmp_path_factory.mktemp("raising") / "template.jinja"
    template.write_text("{% if messages[0].role == 'tool' %}" + RAISING + "{% endif %}fine")
    options = ("--api-key", USER, "--admin-api-key", ADMIN, "--cors-allow-origin", FRIEND)
    with attack(*options, "--chat-template", str(template), key=USER) as both:
        yield both


@pytest.fixture
def guarded(keyed: tuple[Target, Baseline]) -> Iterator[Target]:
    """A server with keys for users and administrators, open to the pages of one origin."""
    with survived(*keyed) as target:
        yield target


@pytest.fixture(scope="module")
def templateless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Baseline]]:
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    file = tmp_path_factory.mktemp("plain") / "tokenizer_config.json"
    file.write_text(json.dumps(config))
    with attack("--tokenizer-config-path", str(file), chats=False) as both:
        yield both


@pytest.fixture
def plain(templateless: tuple[Target, Baseline]) -> Iterator[Target]:
    """A server whose model has no chat template."""
    with survived(*templateless) as target:
        yield target


@pytest.mark.parametrize(
    "path", ["/info", "//info", "/v1/../info", "/%69nfo", "/info/", "/INFO", "/info#/health"]
)
@pytest.mark.parametrize("host", ["x/health?", "a#@b", "127.0.0.1:1", "localhost/openapi.json"])
def test_row_25_no_host_or_spelling_goes_round_the_key(guarded: Target, path: str, host: str) -> None:
    for target in (path, "http://127.0.0.1" + path):
        reply = guarded.raw(
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nX-Request-Id: {guarded.new_id()}\r\n\r\n".encode()
        )
        if reply.status == 400:  # not HTTP at all: refused before there was an id to log
            guarded.ids.pop()
        assert reply.status in (400, 401), target


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {USER}x", f"Bearer {USER.upper()}", USER,
     f"Basic {USER}", f"Bearer {USER}, Bearer {USER}", f"Bearer {USER}\x80", "Bearer \xe9"],
)  # fmt: skip
def test_row_28_what_is_no_key(guarded: Target, value: str | None) -> None:
    for path in ("/generate", CHAT):
        reply = guarded.send(path, {"inputs": "x", "messages": MESSAGES}, headers={"Authorization": value})
        check_error(path, reply, 401)
        assert reply.headers["www-authenticate"] == "Bearer"


def test_row_28_a_key_beside_another_in_the_wrong_header_or_with_nul(guarded: Target) -> None:
    right = f"Authorization: Bearer {USER}\r\n"
    for lines, status in (
        (right + right, 401),
        (right + "Authorization: Bearer wrong\r\n", 401),
        (f"x-api-key: {USER}\r\n", 401),
        (f"Authorization: Bearer {USER}\0\r\n", 400),
    ):
        reply = guarded.raw(guarded.head("/info", lines + "\r\n", method="GET"))
        if status == 400:
            guarded.ids.pop()
        check_error("/info", reply, status)
    assert USER not in guarded.server.log and ADMIN not in guarded.server.log


def test_row_29_a_users_key_is_not_an_administrators(guarded: Target) -> None:
    for (method, path), needed in ACCESS.items():
        if needed is Access.ADMIN:
            check_error(path, guarded.send(path, {}, method=method), 403)
    assert guarded.send("/info", method="GET", headers={"Authorization": f"Bearer {ADMIN}"}).status == 200


def test_row_30_only_public_routes_answer_without_a_key(guarded: Target) -> None:
    answered = {
        (method, path)
        for method, path in ACCESS
        if guarded.send(path, None, method=method, headers={"Authorization": None}).status != 401
    }
    assert answered == {("GET", path) for path in ("/", "/health", "/livez", "/ping", "/readyz")}


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", f"{FRIEND}.evil.example", FRIEND.upper(), FRIEND + ":81"]
)
def test_row_31_pages_of_other_origins_may_not_call(guarded: Target, origin: str) -> None:
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Authorization": None}
    preflight = guarded.send(CHAT, method="OPTIONS", headers=asks)
    answer = guarded.send("/tokenize", {"inputs": "x"}, headers={"Origin": origin})
    assert preflight.status == 401
    assert answer.status == 200
    for reply in (preflight, answer):
        assert not [name for name in reply.headers if name.startswith("access-control-allow")]


def test_row_31_pages_of_the_named_origin_may_but_without_a_browsers_credentials(guarded: Target) -> None:
    asks = {"Origin": FRIEND, "Access-Control-Request-Method": "POST", "Authorization": None}
    preflight = guarded.send(CHAT, method="OPTIONS", headers=asks)
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = guarded.send("/tokenize", {"inputs": "x"}, headers={"Origin": FRIEND})
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in {*preflight.headers, *answer.headers}


def test_row_53_a_chat_with_a_model_that_has_no_template(plain: Target) -> None:
    for path, status in ((CHAT, 400), ("/chat_tokenize", 422), ("/invocations", 400)):
        reply = plain.send(path, {"messages": MESSAGES})
        kind = CHAT if path == "/invocations" else path
        assert "chat_template.jinja" in check_error(kind, reply, status)
    assert plain.send("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1}}).status == 200


def test_row_55_a_template_that_raises(guarded: Target) -> None:
    tool = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    for body in ({"messages": tool}, {"messages": tool, "stream": True}):
        reply = guarded.send(CHAT, body)
        assert "messages please nobody" in check_error(CHAT, reply, 400)
        assert reply.json["error"]["param"] == "messages"
    assert guarded.send(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status == 200

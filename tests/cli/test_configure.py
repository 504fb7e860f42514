"""From options to configurations."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_folder
from tgi_server.config import EngineConfig, ServerConfig
from tgi_server.configure import configurations, memory_plans
from tgi_server.errors import StartupError
from tgi_server.logs import logging_to_stderr
from tgi_server.options import resolve
from tgi_server.text.template import ChatTemplate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path)


def configured(folder: Path, **options: object) -> tuple[ServerConfig, EngineConfig]:
    values, _ = resolve({"model_id": str(folder), "device": "cpu", **options}, {}, launcher=False)
    return configurations(values)


def test_what_is_not_said_follows_from_the_model(folder: Path) -> None:
    server, engine = configured(folder)
    assert server.model_id == folder.name
    assert server.max_total_tokens == engine.max_total_tokens == 512
    assert server.max_input_tokens == 511
    assert engine.num_pages > 0 and engine.num_threads > 0
    assert server.sampling_defaults == {}


@pytest.mark.parametrize(
    ("device", "said", "step"),
    [
        ("cpu", {}, (256, 64)),
        ("cuda", {}, (4096, 256)),
        ("cuda", {"max_batch_tokens": "96", "max_sequences": "8"}, (96, 8)),
        ("cuda", {"max_batch_tokens": "96"}, (256, 256)),  # so that every sequence has its token
    ],
)
def test_a_step_is_as_large_as_suits_the_device_unless_it_is_said(
    folder: Path, device: str, said: dict[str, object], step: tuple[int, int]
) -> None:
    values, _ = resolve({"model_id": str(folder), "device": device, **said}, {}, launcher=False)
    asked = memory_plans(values, 80 << 30)[0].asked
    assert (asked.batch_tokens, asked.sequences) == step


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_total_tokens": "513"}, "513.*512 positions"),
        ({"max_input_tokens": "512"}, "max-input-tokens is 512, but --max-total-tokens is 512"),
        ({"api_key_file": "/nowhere"}, "api-key-file /nowhere cannot be read"),
        ({"model_id": "/nowhere"}, "no such folder"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: on CPUs the KV cache is float32"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_the_numbers(
    folder: Path, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(StartupError, match=complaint):
        configured(folder, **options)


def test_bits_are_kept_whatever_is_beside_a_token_only_if_asked_for(folder: Path) -> None:
    assert not configured(folder)[1].deterministic
    assert configured(folder, deterministic="true")[1].deterministic


def test_sampling_defaults_come_from_the_model_only_if_asked_for(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 257, "max_length": 20}))
    assert configured(folder)[0].sampling_defaults == {}
    for word in ("model", "auto"):
        assert configured(folder, generation_config=word)[0].sampling_defaults == {
            "temperature": 0.6,
            "top_k": 20,
        }
    file.write_text(json.dumps({"do_sample": False}))
    assert configured(folder, generation_config="model")[0].sampling_defaults == {"temperature": 0}
    file.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(StartupError, match="temperature is 'hot'"):
        configured(folder, generation_config="model")


def test_the_start_tells_what_memory_is_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tgi_server"):
        _, engine = configured(folder, max_sequences="2")
    lines = [record.getMessage() for record in caplog.records]
    values = {line[:24].strip(): line[24:].strip() for line in lines}
    assert list(values)[:8] == [
        "devices", "memory of each", "weights", "activations, tables", "graphs", "reserve", "KV cache", "left",
    ]  # fmt: skip
    assert values["tokens of cache"] == str(engine.num_pages * 16) == "1024"


def test_a_template_may_come_from_another_file(folder: Path, tmp_path: Path) -> None:
    template, other = tmp_path / "other.jinja", tmp_path / "other.json"
    template.write_text("from the file")
    other.write_text(json.dumps({"chat_template": "from the config"}))
    messages = [{"role": "user", "content": "x"}]
    for arguments, expected in (((None, template), "from the file"), ((other, None), "from the config")):
        chat = ChatTemplate.from_folder(folder, *arguments)
        assert chat is not None
        assert chat.render(messages) == expected
    with pytest.raises(StartupError, match="does not exist"):
        ChatTemplate.from_folder(folder, None, tmp_path / "missing")


HOSTILE = "one\n\x1b[31mtwo\r\x7f\x9b2J\u2028\u202e\ud800 drei: ü"


@pytest.mark.parametrize("as_json", [True, False])
def test_log_lines_cannot_be_forged(capfd: pytest.CaptureFixture[str], as_json: bool) -> None:
    with logging_to_stderr("info", as_json=as_json):
        logging.getLogger("x").info("%s", HOSTILE)
        logging.getLogger("x").debug("not shown")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.isprintable()
    if as_json:
        assert json.loads(line)["message"] == HOSTILE
    else:
        assert line.endswith(r"INFO one\n\x1b[31mtwo\r\x7f\x9b2J\u2028\u202e\ud800 drei: ü")


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    code = (
        "import logging\nfrom tgi_server.logs import logging_to_stderr\n"
        "with logging_to_stderr('info', as_json=False):\n"
        "    for _ in range(20_000):\n"
        "        logging.getLogger('x').info('a line of some length, so that the pipe is soon full')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=30) == 0

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_folder
from tgi_server.errors import StartupError, UserError
from tgi_server.text.template import ChatTemplate

USER = {"role": "user", "content": "hello"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"})


def test_messages_become_the_prompt_the_template_says(tmp_path: Path) -> None:
    chat = ChatTemplate.from_folder(write_tiny_folder(tmp_path))
    assert chat is not None
    assert chat.render([USER]) == "<|bos|><|user|>hello<|end|><|assistant|>"
    assert chat.render([USER], add_generation_prompt=False) == "<|bos|><|user|>hello<|end|>"


def test_the_last_message_can_be_continued(tmp_path: Path) -> None:
    chat = ChatTemplate.from_folder(write_tiny_folder(tmp_path))
    assert chat is not None
    begun = {"role": "assistant", "content": "well, "}
    prompt = chat.render([USER, begun], continue_final_message=True)
    assert prompt == "<|bos|><|user|>hello<|end|><|assistant|>well,"


def test_a_template_that_refuses_says_so_in_its_own_words(tmp_path: Path) -> None:
    chat = ChatTemplate.from_folder(write_tiny_folder(tmp_path))
    assert chat is not None
    with pytest.raises(UserError, match="no role tool") as raised:
        chat.render([{"role": "tool", "content": "42"}])
    assert raised.value.field == "messages"


def test_what_a_template_says_is_short_and_cannot_forge_lines_of_a_log() -> None:
    with pytest.raises(UserError) as raised:
        template("{{ raise_exception(messages[0].content) }}").render(
            [{**USER, "content": "a\r\nb\x1b" * 500}]
        )
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 600


def test_a_jinja_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}from the file")
    chat = ChatTemplate.from_folder(tmp_path)
    assert chat is not None
    assert chat.render([USER]) == "<|bos|>from the file"


def test_older_checkpoints_have_their_template_and_their_tokens_in_files_of_their_own(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path, template=None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokens = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|other|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ bos_token }}{{ eos_token }}"}')
    chat = ChatTemplate.from_folder(tmp_path)
    assert chat is not None
    assert chat.render([USER]) == "<|bos|><|end|>"


def test_of_several_named_templates_tools_choose_theirs(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    chat = ChatTemplate.from_folder(tmp_path)
    assert chat is not None
    assert chat.render([USER]) == "plain"
    assert chat.render([USER], tools=[{"type": "function"}]) == "tools"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(write_tiny_folder(tmp_path, template=None)) is None


def test_a_template_with_a_mistake_stops_the_start_and_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer_config.json: line 2"):
        ChatTemplate.from_folder(write_tiny_folder(tmp_path, template="\n{% if %}"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': '<&>', 'a': 1} | tojson }}", '{"b": "<&>", "a": 1}'),
        ("{{ 'é' | tojson }}", '"é"'),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ messages[0].content.strip() }}", "hello"),
        ("{{ tools is none }}", "True"),
    ],
)
def test_templates_have_what_those_of_the_hub_use(source: str, expected: str) -> None:
    assert template(source).render([USER]) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ messages[5].content }}{{ undefined_name.attribute }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_and_its_faults_are_the_requests(source: str) -> None:
    with pytest.raises(UserError):
        template(source).render([USER])


def test_a_clients_variables_cannot_replace_the_servers() -> None:
    chat = template("{{ messages | length }}{{ bos_token }}{{ thinking }}")
    extra = {"messages": [], "bos_token": "forged", "thinking": True}
    assert chat.render([USER], extra=extra) == "1<s>True"


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 40_000 + "1" + ")" * 40_000 + "}}",
        "{% if a %}" * 2000 + "{% endif %}" * 2000,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    ],
    ids=["parentheses", "conditions", "loops"],
)
def test_a_template_that_python_cannot_compile_is_refused_at_the_start(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(StartupError, match=r"chat_template\.jinja: the chat template is nested too deep"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_that_takes_seconds_to_compile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{a}}" * 20_001)
    with pytest.raises(StartupError, match="a chat template of 100005 characters; 100000 are taken at most"):
        ChatTemplate.from_folder(tmp_path)

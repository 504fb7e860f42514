from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from tgi_server.errors import ErrorKind, UserError
from tgi_server.text.renderer import Renderer, RenderLimits
from tgi_server.text.template import ChatTemplate

USER = {"role": "user", "content": "hello"}
LIMITS = RenderLimits(time_s=0.3)
ENDLESS = (
    "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{% endif %}fine"
)

Make = Callable[..., Renderer]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Renderer] = []

    def renderer(source: str, limits: RenderLimits = LIMITS) -> Renderer:
        made.append(Renderer(ChatTemplate({"default": source}, {"bos_token": "<s>"}), limits))
        return made[-1]

    yield renderer
    for one in made:
        await one.close()


async def test_a_prompt_is_what_the_template_itself_renders(make: Make) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ thinking }}{{ add_generation_prompt }}"
    extra = {"thinking": "é"}
    expected = ChatTemplate({"default": source}, {"bos_token": "<s>"}).render([USER], extra=extra)
    assert await make(source).render([USER], extra=extra) == expected == "<s>helloéTrue"


async def test_a_refusal_keeps_the_templates_words(make: Make) -> None:
    renderer = make("{{ raise_exception('no such role') }}")
    for _ in range(2):
        with pytest.raises(UserError, match="no such role") as raised:
            await renderer.render([USER])
        assert raised.value.kind is ErrorKind.TEMPLATE
        assert raised.value.field == "messages"


async def test_a_template_that_does_not_end_is_ended_and_the_next_prompt_comes_all_the_same(
    make: Make,
) -> None:
    renderer = make(ENDLESS)
    with pytest.raises(UserError, match=r"longer than 0\.3 s"):
        await renderer.render([{"role": "user", "content": "loop"}])
    assert await renderer.render([USER]) == "fine"


async def test_the_event_loop_goes_on_meanwhile(make: Make) -> None:
    renderer = make(ENDLESS)
    await renderer.start()
    stuck = asyncio.create_task(renderer.render([{"role": "user", "content": "loop"}]))
    longest_s = 0.0
    while not stuck.done():
        began_s = time.monotonic()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, time.monotonic() - began_s)
    assert longest_s < 0.2
    assert isinstance(stuck.exception(), UserError)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ messages[0].content * (2 ** 30) }}", "memory"),
        ("{% for i in range(50000) %}{{ 'x' * 1000 }}{% endfor %}", "more than 4194304 characters"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
            "mem",
        ),
    ],
)
async def test_a_template_that_grows_is_stopped(make: Make, source: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        await make(source, RenderLimits(time_s=20)).render([USER])


async def test_a_worker_that_was_killed_is_replaced_unnoticed(make: Make) -> None:
    renderer = make("fine")
    for _ in range(3):
        assert await renderer.render([USER]) == "fine"
        os.kill(worker().pid, signal.SIGKILL)


async def test_a_client_that_leaves_does_not_shift_the_answers_of_others(make: Make) -> None:
    renderer = make("{{ messages[0].content }}")
    await renderer.start()
    leaving = [asyncio.create_task(renderer.render([{"role": "user", "content": "left"}])) for _ in range(5)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    texts = [str(i) for i in range(20)]
    rendered = await asyncio.gather(*(renderer.render([{"role": "user", "content": t}]) for t in texts))
    assert rendered == texts


async def test_only_those_whose_template_does_not_end_are_refused(make: Make) -> None:
    renderer = make(ENDLESS)
    contents = ["hello", "loop", "hello", "hello", "loop", "hello"]
    jobs = [renderer.render([{"role": "user", "content": content}]) for content in contents]
    answers = await asyncio.gather(*jobs, return_exceptions=True)
    assert [content for content, answer in zip(contents, answers, strict=True) if answer == "fine"] == [
        "hello"
    ] * 4
    assert [str(answer) for answer in answers if answer != "fine"] == [
        "the model's chat template took longer than 0.3 s for these messages"
    ] * 2


async def test_in_a_crowd_everybody_gets_their_own_prompt_whoever_hangs_or_leaves(make: Make) -> None:
    renderer = make(ENDLESS.replace("fine", "{{ messages[0].content }}"))
    chance = random.Random(4)

    async def ask(i: int) -> bool:
        await asyncio.sleep(chance.random())
        content = "loop" if i % 80 == 40 else str(i) * chance.choice([1, 100, 10_000])
        asked = asyncio.create_task(renderer.render([{"role": "user", "content": content}]))
        if i % 7 == 3:
            await asyncio.sleep(0.001)
            asked.cancel()
        (answer,) = await asyncio.gather(asked, return_exceptions=True)
        if isinstance(answer, asyncio.CancelledError):
            return i % 7 == 3
        return isinstance(answer, UserError) if content == "loop" else answer == content

    assert all(await asyncio.gather(*(ask(i) for i in range(200))))


async def test_a_prompt_longer_than_a_pipe_holds_comes_whole_among_short_ones(make: Make) -> None:
    renderer = make("{{ messages[0].content }}")
    texts = [str(i) * (1_000_000 if i % 3 == 0 else 10) for i in range(10)]
    rendered = await asyncio.gather(*(renderer.render([{"role": "user", "content": t}]) for t in texts))
    assert rendered == texts


async def test_a_worker_that_is_stopped_is_replaced(make: Make) -> None:
    renderer = make("fine")
    await renderer.start()
    os.kill(worker().pid, signal.SIGSTOP)
    assert await renderer.render([USER]) == "fine"


async def test_closing_leaves_no_process(make: Make) -> None:
    renderer = make("fine")
    await renderer.start()
    process = worker()
    await renderer.close()
    assert not process.is_running()


def worker() -> psutil.Process:
    """This process's one template worker."""
    (found,) = [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "render_worker" in " ".join(child.cmdline())
    ]
    return found

"""Drawn tokens depend on seed, choice, position and text alone; what else is asked of logits is transformers'."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Reference
from tests.e2e.inprocess import Answer, Rig
from tests.server import DEMO, Server
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import GenerationRequest, Sampling, TokenEvent
from tgi_server.engine.runner import CpuRunner, Launched

NEW_TOKENS = 24
SETTINGS = (
    Sampling(temperature=1.0),
    Sampling(),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    Sampling(temperature=1.0, typical_p=0.8),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.3, logit_bias={260: 2.0, 198: -3.0}),
    Sampling(temperature=0.8, watermark=True),
)


class AskingRig(Rig):
    """A rig whose requests say how they want their tokens."""

    @property
    def preemptions(self) -> int:
        return self._scheduler.counts.preemptions

    def ask(self, requests: Sequence[GenerationRequest]) -> list[TokenEvent]:
        """Each request's events in one, in the order of requests."""
        for request in requests:
            assert self._scheduler.add(request) is None
        events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        under_way: deque[tuple[Plan, Launched]] = deque()
        while self._scheduler.running or self._scheduler.waiting or under_way:
            plan = self._scheduler.plan()
            if plan.work:
                self.steps.append([work.count for work in plan.work])
                under_way.append((plan, self._runner.launch(plan)))
            if under_way and (len(under_way) > self._depth or not plan.work):
                done, launched = under_way.popleft()
                for event in self._scheduler.commit(done, launched.result()):
                    events[event.id].append(event)
        return [_joined(events[request.id]) for request in requests]


def _joined(events: list[TokenEvent]) -> TokenEvent:
    for event in events[1:]:
        assert not event.prompt_logprobs and not event.prompt_top
    return TokenEvent(
        events[0].id,
        [token for event in events for token in event.token_ids],
        [logprob for event in events for logprob in event.logprobs],
        events[-1].finish,
        top=[top for event in events for top in event.top],
        prompt_logprobs=events[0].prompt_logprobs,
        prompt_top=events[0].prompt_top,
    )


@pytest.fixture(scope="module")
def requests(reference: Reference) -> list[GenerationRequest]:
    """Short prompts, each with other settings and its own seed."""
    prompts = [prompt for prompt in reference.prompts if len(prompt) < 200]
    return [
        GenerationRequest(
            id=str(i),
            prompt_ids=prompt,
            max_new_tokens=NEW_TOKENS,
            sampling=msgspec.structs.replace(SETTINGS[i % len(SETTINGS)], seed=2**64 - 1 - i),
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def alone(runner: CpuRunner, requests: list[GenerationRequest]) -> list[Answer]:
    return [_answer(AskingRig(runner).ask([request])[0]) for request in requests]


def _answer(event: TokenEvent) -> Answer:
    return Answer(list(event.token_ids), list(event.logprobs))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_seed_gives_the_same_bits_among_sixteen(
    runner: CpuRunner, requests: list[GenerationRequest], alone: list[Answer], depth: int
) -> None:
    rig = AskingRig(runner, sequences=16, depth=depth)
    assert list(map(_answer, rig.ask(requests))) == alone


@pytest.mark.parametrize("depth", [0, 1])
def test_a_seed_gives_the_same_bits_after_preemption_in_chunks_and_with_cached_prefixes(
    runner: CpuRunner, requests: list[GenerationRequest], alone: list[Answer], depth: int
) -> None:
    rig = AskingRig(runner, sequences=16, pages=14, batch_tokens=19, depth=depth)
    assert list(map(_answer, rig.ask(requests))) == alone
    assert list(map(_answer, rig.ask(requests))) == alone
    assert rig.preemptions > 0


def test_greedy_requests_get_the_same_bits_beside_drawn_ones(
    requests: list[GenerationRequest], alone: list[Answer], reference: Reference
) -> None:
    plain = [
        i
        for i, request in enumerate(requests)
        if request.sampling.temperature == 0 and not request.sampling.penalised
    ]
    assert plain
    for i in plain:
        answer = reference.answers[reference.prompts.index(requests[i].prompt_ids)]
        assert alone[i] == answer.first(NEW_TOKENS)


def test_another_seed_or_choice_gives_another_answer(
    runner: CpuRunner, requests: list[GenerationRequest], alone: list[Answer]
) -> None:
    (first,) = [request for request in requests if request.id == "0"]
    others = [
        msgspec.structs.replace(first, id="seed", sampling=Sampling(temperature=1.0, seed=7)),
        msgspec.structs.replace(
            first, id="choice", sampling=Sampling(temperature=1.0, seed=first.sampling.seed, choice=1)
        ),
    ]
    answers = [tuple(event.token_ids) for event in AskingRig(runner, sequences=4).ask([first, *others])]
    assert answers[0] == tuple(alone[0].ids)
    assert len(set(answers)) == 3


def test_a_large_bias_forces_a_token_and_a_small_one_forbids_it(
    runner: CpuRunner, reference: Reference
) -> None:
    prompt, first = reference.prompts[0], reference.answers[0].ids[0]
    ask = [
        _request("force", prompt, Sampling(logit_bias={1234: 100.0}), new=3),
        _request("forbid", prompt, Sampling(logit_bias={first: -100.0}), new=3),
    ]
    force, forbid = AskingRig(runner, sequences=2).ask(ask)
    assert force.token_ids == [1234] * 3
    assert forbid.token_ids[0] != first


def test_an_answer_does_not_end_before_min_new_tokens(runner: CpuRunner, reference: Reference) -> None:
    prompt, answer = reference.prompts[0], reference.answers[0].ids
    stops = answer[:2]
    early = _request("early", prompt, Sampling(), new=20, stop_token_ids=stops)
    late = msgspec.structs.replace(early, id="late", min_new_tokens=10)
    biased = msgspec.structs.replace(late, id="biased", sampling=Sampling(logit_bias={stops[0]: 100.0}))
    events = AskingRig(runner, sequences=4).ask([early, late, biased])
    assert len(events[0].token_ids) == 1
    assert not set(events[1].token_ids[:10]) & set(stops)
    assert len(events[2].token_ids) == 11 and events[2].token_ids[-1] == stops[0]


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[int]]:
    """A few short ones, one token, and one that is several pages long."""
    return [*reference.prompts[:4], [504], reference.prompts[-1][:150]]


@pytest.fixture(scope="module")
def theirs(prompts: list[list[int]]) -> list[Tensor]:
    """transformers' logprobs after every token of the prompts: [tokens, vocab] each."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("batch_tokens", [19, 4096])
def test_prompt_logprobs_equal_those_of_transformers_whatever_the_cache_holds(
    runner: CpuRunner, prompts: list[list[int]], theirs: list[Tensor], batch_tokens: int, depth: int
) -> None:
    rig = AskingRig(runner, sequences=6, pages=13, batch_tokens=batch_tokens, depth=depth)
    asked = [
        _request(str(i), prompt, Sampling(), new=30, prompt_logprobs=True, top_logprobs=3)
        for i, prompt in enumerate(prompts)
    ]
    for _ in range(2):  # the second time all prompts are in the cache
        for event, prompt, logprobs in zip(rig.ask(asked), prompts, theirs, strict=True):
            want = logprobs[:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
            ours = torch.tensor(event.prompt_logprobs)
            assert ours.shape == want.shape and (ours - want).abs().lt(1e-3).all()
            assert len(event.prompt_top) == len(want)
            for top, row in zip(event.prompt_top, logprobs, strict=False):
                _check_top(top, row, 3)
    assert rig.preemptions > 0


def test_top_logprobs_are_of_the_raw_logits(
    runner: CpuRunner, prompts: list[list[int]], theirs: list[Tensor]
) -> None:
    cold = Sampling(temperature=0.1, top_k=2, repetition_penalty=3.0, seed=1)
    asked = [
        msgspec.structs.replace(_request(str(n), prompts[0], cold, new=2), top_logprobs=n)
        for n in (0, 1, 5, 20)
    ]
    events = AskingRig(runner, sequences=4).ask(asked)
    for event, count in zip(events, (0, 1, 5, 20), strict=True):
        assert [len(top) for top in event.top] == ([count] * 2 if count else [])
        if count:
            _check_top(event.top[0], theirs[0][-1], count)
        assert abs(event.logprobs[0] - theirs[0][-1, event.token_ids[0]].item()) <= 1e-3


def _check_top(top: list[tuple[int, float]], logprobs: Tensor, count: int) -> None:
    ids = torch.tensor([token for token, _ in top])
    ours = torch.tensor([logprob for _, logprob in top])
    assert (ours - logprobs.topk(count).values).abs().max() <= 1e-3
    assert (ours - logprobs[ids]).abs().max() <= 1e-3
    assert len(set(ids.tolist())) == count


def _request(name: str, prompt: list[int], sampling: Sampling, new: int, **more: Any) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=prompt, max_new_tokens=new, sampling=sampling, **more)


# ---- over HTTP ----

PROMPT = "Once upon a time in a small village"
NOISY = {"temperature": 2.0, "max_new_tokens": 40}
DRAWN = {"temperature": 0.9, "top_k": 60, "top_p": 0.97, "seed": 2**63 + 5}


def _generate(server: Server) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {**DRAWN, "max_new_tokens": NEW_TOKENS, "details": True}}
    return [token["id"] for token in server.post("/generate", body)["details"]["tokens"]]


def _generate_stream(server: Server) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {**DRAWN, "max_new_tokens": NEW_TOKENS}}
    return [event["token"]["id"] for event in server.stream("/generate_stream", body)]


def _completions(server: Server) -> list[int]:
    body = {**DRAWN, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    return server.post("/v1/completions", body)["choices"][0]["token_ids"]


def _chat(server: Server) -> list[int]:
    messages = [{"role": "user", "content": PROMPT}]
    body = {**DRAWN, "messages": messages, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    return server.post("/v1/chat/completions", body)["choices"][0]["token_ids"]


def _chats_prompt_completed(server: Server) -> list[int]:
    """A completion, in a stream, of the very tokens of the chat's prompt."""
    seen = server.post("/chat_tokenize", {"messages": [{"role": "user", "content": PROMPT}]})
    prompt = [token["id"] for token in seen["tokenize_response"]]
    asked = {"max_tokens": NEW_TOKENS, "return_token_ids": True, "stream": True}
    chunks = server.stream("/v1/completions", {**DRAWN, "prompt": prompt, **asked})
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]


ROUTES = (_generate, _generate_stream, _completions, _chat, _chats_prompt_completed)


def test_a_seed_gives_the_same_text_on_every_route_whatever_else_runs(server: Server) -> None:
    quiet = [ask(server) for ask in ROUTES]
    assert quiet[0] == quiet[1] == quiet[2]
    assert quiet[3] == quiet[4]
    asked = {"inputs": PROMPT, "parameters": {**DRAWN, "max_new_tokens": NEW_TOKENS}}
    whole = server.post("/generate", asked)["generated_text"]
    assert server.post("/vertex", {"instances": [asked]})["predictions"] == [whole]
    assert server.post("/invocations", asked) == [{"generated_text": PROMPT + whole}]
    with ThreadPoolExecutor(16) as pool:
        crowd = [
            pool.submit(server.post, "/generate", {"inputs": f"Item {i}:", "parameters": NOISY})
            for i in range(8)
        ]
        busy = list(pool.map(lambda ask: ask(server), ROUTES))
        for other in crowd:
            other.result()
    assert busy == quiet


def test_the_choices_of_a_request_differ_and_its_seed_repeats_them(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.2, "seed": 3, "n": 4}
    first, again = (
        [choice["text"] for choice in server.post("/v1/completions", body)["choices"]] for _ in range(2)
    )
    assert len(set(first)) == 4
    assert first == again


def test_the_best_of_several_is_reported_with_the_others(server: Server) -> None:
    body = {
        "inputs": PROMPT,
        "parameters": {"best_of": 2, "do_sample": True, "max_new_tokens": 8, "details": True},
    }
    details = server.post("/generate", body)["details"]
    (other,) = details["best_of_sequences"]
    means = [
        sum(token["logprob"] for token in one["tokens"]) / len(one["tokens"]) for one in (details, other)
    ]
    assert means[0] >= means[1]


def test_input_details_and_echo_report_the_same_logprobs(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
    prefill = server.post("/generate", body)["details"]["prefill"]
    echo = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 2, "temperature": 0}
    logprobs = server.post("/v1/completions", echo)["choices"][0]["logprobs"]
    assert prefill[0]["logprob"] is None and logprobs["token_logprobs"][0] is None
    assert [token["logprob"] for token in prefill] == logprobs["token_logprobs"]
    # The prompt's own token is always among them, as OpenAI promises.
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])

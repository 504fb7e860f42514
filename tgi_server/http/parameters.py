"""How an answer is made: the part of a request that all flavours share, read from each one's fields."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tgi_server.config import ServerConfig
from tgi_server.engine.request import Sampling
from tgi_server.http.schema import INT32_MAX, Fields, check_integer, check_number, check_text, invalid, shown
from tgi_server.text.stop import StopStrings

MAX_CHOICES = 16
MAX_OPENAI_STOPS = 64
MAX_OPENAI_TOP_TOKENS = 20
MAX_SALT_CHARS = 256

_MAX_STOP_CHARS = 8192  # of all stop strings together: the matcher keeps a state for each character
_MAX_BIASES = 1024
_MAX_STOP_TOKENS = 256
_UINT64 = 2**64
MAX_PRIORITY = 100  # as the engine counts: a thousand seconds of overtaking either way
# Below this a temperature only overflows: the likeliest token has all the probability there is.
_COLDEST = 1e-4


@dataclass(frozen=True)
class Parameters:
    """All bounds are checked. None means: not said."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    keep_stop: bool = False  # whether the stop string stays in the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    choices: int = 1
    logprobs: bool = False  # whether the client asked to see them
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    priority: int = 0  # smaller is more urgent
    cache_salt: str = (
        ""  # who sends the same may find each other's prompts in the cache; empty: who has the same key
    )

    @cached_property
    def stop_strings(self) -> StopStrings:
        """`stops`, ready to be looked for; made when first needed, and shared by all answers."""
        return StopStrings(self.stops)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def seed(self) -> int | None:
        """What TGI reports: nothing when nothing is drawn."""
        return None if self.greedy else self.sampling.seed


@dataclass(frozen=True)
class _Asked:
    """Reads fields and refuses by name what the engine would not act on."""

    fields: Fields
    honoured: frozenset[str]
    defaults: Mapping[str, float] = field(default_factory=dict)  # for what is not said

    def default(self, name: str, neutral: float) -> float:
        return self.defaults.get(name, neutral) if name in self.honoured else neutral

    def honour(self, attribute: str, name: str, value: object, neutral: object) -> None:
        if value is None or value == neutral or attribute in self.honoured:
            return
        sent = shown(self.fields.raw(name))
        self.fields.refuse(name, f"is {sent}, which this server does not support yet; leave it out")

    def integer(self, name: str, attribute: str, low: int, high: int, neutral: int) -> int:
        value = self.fields.integer(name, low, high)
        self.honour(attribute, name, value, neutral)
        return neutral if value is None else value

    def number(
        self, name: str, low: float, high: float, neutral: float, *, above: float | None = None
    ) -> float:
        value = self.fields.number(name, low, high, above=above)
        self.honour(name, name, value, neutral)
        return self.default(name, neutral) if value is None else value

    def flag(self, name: str, attribute: str) -> bool:
        value = self.fields.flag(name)
        self.honour(attribute, name, value, False)
        return value is True

    def temperature(self) -> float | None:
        value = self.fields.number("temperature", 0.0, 100.0)
        if value is None:
            return self.defaults.get("temperature") if "temperature" in self.honoured else None
        return 0.0 if value < _COLDEST else value

    def top_k(self, low: int) -> int:
        value = self.fields.integer("top_k", low, INT32_MAX)
        self.honour("top_k", "top_k", value, 0)
        return max(0, int(self.default("top_k", 0)) if value is None else value)


def read_tgi(fields: Fields | None, honoured: frozenset[str], config: ServerConfig) -> Parameters:
    """TGI's `parameters` object; None when the request has none, which by its rules means sampling.

    While the engine cannot sample, not asking for anything means greedy; asking for it is refused.
    """
    if fields is None:
        fields = Fields({} if "temperature" not in honoured else {"do_sample": True}, "parameters")
    asked = _Asked(fields, honoured, config.sampling_defaults)
    fields.refuse_all("grammar", "adapter_id")
    best_of = asked.integer("best_of", "choice", 1, config.max_best_of, 1)
    sampling = _tgi_sampling(asked)
    if best_of > 1 and (sampling.temperature == 0 or fields.has("seed")):
        fields.refuse("best_of", f"is {best_of}; more than 1 needs sampling (do_sample) and no seed")
    top = asked.integer("top_n_tokens", "top_logprobs", 0, config.max_top_n_tokens, 0)
    return Parameters(
        max_new_tokens=fields.integer("max_new_tokens", 1, INT32_MAX),
        sampling=sampling,
        stops=_stops(fields, "stop", config.max_stop_sequences),
        keep_stop=True,
        choices=best_of,
        logprobs=True,
        top_logprobs=top,
        prompt_logprobs=asked.flag("decoder_input_details", "prompt_logprobs"),
        priority=_priority(fields),
        cache_salt=_cache_salt(fields),
    )


def _tgi_sampling(asked: _Asked) -> Sampling:
    """Sampling happens if `do_sample` says so or a field that only means something with it is set."""
    fields = asked.fields
    temperature = asked.temperature()
    top_k = asked.top_k(0)
    top_p = asked.number("top_p", 0.0, 1.0, 1.0, above=0.0)
    typical_p = asked.number("typical_p", 0.0, 1.0, 1.0, above=0.0)
    do_sample = fields.flag("do_sample") is True
    drawn = do_sample or temperature not in (None, 1.0) or top_k > 0 or top_p < 1 or typical_p < 1
    used = (1.0 if temperature is None else temperature) if drawn else 0.0
    asked.honour("temperature", "do_sample" if do_sample else "temperature", used or None, 0.0)
    seed = fields.integer("seed", 0, _UINT64 - 1)
    return Sampling(
        temperature=used,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        repetition_penalty=asked.number("repetition_penalty", 0.01, 100.0, 1.0),
        frequency_penalty=asked.number("frequency_penalty", -2.0, 2.0, 0.0),
        watermark=asked.flag("watermark", "watermark"),
        seed=_seed(seed) if used else 0,
    )


def read_openai(
    fields: Fields,
    honoured: frozenset[str],
    vocab_size: int,
    defaults: Mapping[str, float],
    *,
    least_tokens: int = 1,
) -> Parameters:
    """The fields OpenAI's two generating endpoints share, and those other servers added.

    defaults: for sampling fields that are left out. least_tokens: the smallest `max_tokens`.
    """
    asked = _Asked(fields, honoured, defaults)
    temperature = asked.temperature()
    if temperature is None:
        temperature = 1.0 if "temperature" in honoured else 0.0
    asked.honour("temperature", "temperature", temperature, 0.0)
    seed = fields.integer("seed", -(2**63), _UINT64 - 1)
    longest = _either(fields, "max_tokens", "max_completion_tokens", least_tokens)
    shortest = asked.integer("min_tokens", "min_new_tokens", 0, INT32_MAX, 0)
    if longest is not None and shortest > longest:
        fields.refuse("min_tokens", f"is {shortest}, more than max_tokens {longest}")
    return Parameters(
        max_new_tokens=longest,
        min_new_tokens=shortest,
        sampling=Sampling(
            temperature=temperature,
            top_k=asked.top_k(-1),
            top_p=asked.number("top_p", 0.0, 1.0, 1.0, above=0.0),
            typical_p=asked.number("typical_p", 0.0, 1.0, 1.0, above=0.0),
            min_p=asked.number("min_p", 0.0, 1.0, 0.0),
            repetition_penalty=asked.number("repetition_penalty", 0.01, 100.0, 1.0),
            frequency_penalty=asked.number("frequency_penalty", -2.0, 2.0, 0.0),
            presence_penalty=asked.number("presence_penalty", -2.0, 2.0, 0.0),
            logit_bias=_logit_bias(asked, vocab_size),
            seed=_seed(seed) if temperature else 0,
        ),
        stops=_stops(fields, "stop", MAX_OPENAI_STOPS),
        keep_stop=fields.flag("include_stop_str_in_output") is True,
        stop_token_ids=_stop_token_ids(fields, vocab_size),
        ignore_eos=fields.flag("ignore_eos") is True,
        choices=asked.integer("n", "choice", 1, MAX_CHOICES, 1),
        priority=_priority(fields),
        cache_salt=_cache_salt(fields),
    )


def refuse_unhonoured(fields: Fields, name: str, attribute: str, honoured: frozenset[str]) -> None:
    """Refuse a field that was given if the engine would not act on it."""
    _Asked(fields, honoured).honour(attribute, name, fields.raw(name), None)


def _priority(fields: Fields) -> int:
    return fields.integer("priority", -MAX_PRIORITY, MAX_PRIORITY) or 0


def _cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt")
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_SALT_CHARS:
        fields.refuse(
            "cache_salt", f"has {len(salt)} characters; give 1 to {MAX_SALT_CHARS}, or leave it out"
        )
    return salt


def _seed(given: int | None) -> int:
    """Negative seeds count from the end of the 64-bit range, as two's complement has it."""
    return secrets.randbits(64) if given is None else given % _UINT64


def _either(fields: Fields, old: str, new: str, low: int) -> int | None:
    first, second = fields.integer(old, low, INT32_MAX), fields.integer(new, low, INT32_MAX)
    if first is not None and second is not None and first != second:
        fields.refuse(new, f"is {second}, but {old} is {first}; give one of them")
    return second if first is None else first


def _stops(fields: Fields, name: str, most: int) -> tuple[str, ...]:
    """One string or an array of them."""
    value = fields.raw(name)
    if isinstance(value, str):
        stops = [value]
    else:
        entries: Iterable[object] = fields.items(name, most) or ()
        stops = [check_text(entry, f"{fields.path(name)}[{i}]") for i, entry in enumerate(entries)]
    if "" in stops:
        fields.refuse(name, "holds an empty string, which stands before every text; leave it out")
    chars = sum(map(len, stops))
    if chars > _MAX_STOP_CHARS:
        fields.refuse(name, f"has {chars} characters; at most {_MAX_STOP_CHARS} are allowed")
    return tuple(stops)


def _stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    path = fields.path("stop_token_ids")
    entries = fields.items("stop_token_ids", _MAX_STOP_TOKENS) or ()
    return tuple(check_integer(entry, f"{path}[{i}]", 0, vocab_size - 1) for i, entry in enumerate(entries))


def _logit_bias(asked: _Asked, vocab_size: int) -> dict[int, float]:
    """OpenAI's object: token id, as a string, to the value added to its logit."""
    fields = asked.fields
    bias = fields.raw("logit_bias")
    if bias is None or bias in ({}, []):
        return {}
    path = fields.path("logit_bias")
    if not isinstance(bias, dict):
        invalid(path, "is no object; give one of token ids to numbers")
    if len(bias) > _MAX_BIASES:
        invalid(path, f"has {len(bias)} entries; at most {_MAX_BIASES} are allowed")
    asked.honour("logit_bias", "logit_bias", bias, {})
    read = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        check_integer(token_id if token_id >= 0 else key, f"{path} key", 0, vocab_size - 1)
        read[token_id] = check_number(value, f"{path}.{key}", -100.0, 100.0)
    return read

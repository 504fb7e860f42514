"""Frozen settings, made once at the edge and passed down; nothing writes to them later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tgi_server.errors import StartupError

PAGE_TOKENS = 16  # tokens a KV page holds: 16 rows are one TMA box, see docs/structure.md
MAX_LAYERS = 4096  # an order above any model: what is worked out for each layer ends in a moment


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` says of a decoder, under the names the rest of the code uses."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    rope_scaling: Mapping[str, object] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` and, for the end-of-sequence ids, `generation_config.json`.

        Raises StartupError naming the file or the key that is missing or of the wrong type.
        """
        config = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return cls.from_dict(config, generation)

    @classmethod
    def from_dict(cls, config: Mapping[str, object], generation: Mapping[str, object]) -> ModelConfig:
        heads = _integer(config, "num_attention_heads")
        hidden = _integer(config, "hidden_size")
        # transformers 5 moved rope_theta and the scaling into one table, older configs have two keys.
        rope = _table(config, "rope_parameters") or _table(config, "rope_scaling")
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        vocab = _integer(config, "vocab_size")
        kv_heads = _integer(config, "num_key_value_heads", heads)
        if config.get("head_dim") is None and hidden % heads:
            raise StartupError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no "
                "head_dim"
            )
        if heads % kv_heads:
            raise StartupError(
                f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        return cls(
            model_type=str(config.get("model_type", "")),
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=_integer(config, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_integer(config, "head_dim", hidden // heads),
            max_positions=_integer(config, "max_position_embeddings"),
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=_number({"rope_theta": theta}, "rope_theta"),
            tie_embeddings=config.get("tie_word_embeddings", False) is True,
            rope_scaling=rope,
            eos_token_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id")), vocab),
            raw=config,
        )


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to know; it travels to it as JSON."""

    model: Path
    max_total_tokens: int  # prompt and answer of one request
    max_batch_tokens: int  # tokens one step may compute
    max_sequences: int  # sequences one step may run
    max_queue: int  # requests waiting or running before new ones are refused
    num_pages: int  # of KV cache; on a GPU at most these, 0: as many as fit
    num_threads: int
    target_s: float = 0.1  # wished time between two tokens of a stream while prompts are read
    queue_timeout_s: float = 0.0  # a request not begun within it ends; 0: it waits as long as it takes
    device: str = "cpu"  # or "cuda"
    dtype: str = "bfloat16"  # or "float16": what a GPU computes in
    fp8_cache: bool = False  # keys and values are float8 (e4m3), on a GPU
    memory_fraction: float = 1.0  # of a GPU's memory, that this server may take
    dummy_weights: bool = False  # random ones, for measuring
    quantize: str = ""  # the format weights are in, or get while they load; "": as the checkpoint says
    deterministic: bool = False  # bits of a token depend on its own sequence alone, whatever that costs
    cpu_isa: str = "auto"  # instruction set of the kernels on a CPU; "auto": the best there is
    page_ids: tuple[int, ...] = ()  # text that the model has to foretell before it is served; empty: none
    log_level: str = "info"
    log_as_json: bool = False


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP front end needs to know."""

    model: Path
    model_id: str  # what clients see
    host: str
    port: int
    max_total_tokens: int
    max_queue: int
    payload_limit_bytes: int = 2_000_000
    grace_s: float = 90.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: every route is open
    admin_keys: tuple[str, ...] = field(default=(), repr=False)  # good for admin routes, and for all others
    parse_special_in_content: bool = False  # special tokens spelled out in chat messages are tokens
    strict_fields: bool = False  # a request with a field nobody knows is refused, not answered with a header
    max_input_tokens: int | None = None  # of a prompt; None: all but one of max_total_tokens
    max_best_of: int = 2  # this and the next two bind TGI's routes
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 64  # prompts of one completions request
    chat_template: Path | None = None  # used instead of the model's
    tokenizer_config: Path | None = None  # read instead of the model's
    prometheus_port: int | None = None  # where `/metrics` is, open to all; None: beside the other routes
    cors_allow_origin: tuple[str, ...] = ()  # origins whose pages may call; "*" is any
    otlp_endpoint: str | None = None  # where traces go; None: none are made
    otlp_service_name: str = "tgi-server"
    ssl_certfile: Path | None = None  # PEM, with its chain; TLS if given
    ssl_keyfile: Path | None = None
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # for fields a request leaves out
    compute_type: str = "cpu"  # what answers say they were computed on, as `x-compute-type`


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StartupError(
            f"{path} does not exist; give a folder that holds a Hugging Face checkpoint"
        ) from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _integer(
    config: Mapping[str, object], key: str, default: int | None = None, *, most: int = 1 << 40
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise StartupError(
            f"config.json: {key} is {repr(value)[:80]}; a positive whole number up to {most} is needed"
        )
    return value


def _number(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise StartupError(f"config.json: {key} is {value!r}; a positive number is needed")
    return float(value)


def _table(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise StartupError(f"config.json: {key} is {value!r}; an object is needed")
    return value


def _ids(value: object, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise StartupError(f"eos_token_id is {value!r}; a token id or a list of them is needed")
    if max(ids, default=0) >= vocab_size:
        raise StartupError(f"eos_token_id is {value!r}, but config.json's vocab_size is {vocab_size}")
    return tuple(ids)

"""Every option of the command line, in one table: ours, TGI's and vLLM's names for them, and what each does here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final
from urllib.parse import urlsplit


class Effect(Enum):
    """What giving an option does."""

    WORKS = "works"
    IGNORED = "ignored"  # it is accepted, and one warning says why it changes nothing
    REFUSED = "refused"  # the server does not start: ignoring it would break what was asked for


@dataclass(frozen=True)
class Flag:
    """One option. It may be given on the command line, in the environment and in the configuration file."""

    name: str  # without dashes in front: "max-total-tokens"
    group: str
    help: str  # for an option that does not work: why
    parse: Callable[[str], object] = str
    default: object = None
    others: tuple[str, ...] = ()  # more names, those of one letter with one dash
    is_switch: bool = False
    repeats: bool = False
    effect: Effect = Effect.WORKS
    neutral: tuple[str, ...] = ()  # of one that is refused: values that ask for nothing
    good: Callable[[str], object] | None = None  # in the environment, what this refuses is not meant for us
    launcher_default: object = None  # what it is under TGI's name of the command, if not `default`

    @property
    def key(self) -> str:
        """Its name as a variable of Python's."""
        return self.name.replace("-", "_")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables it is read from, the first that is set counts."""
        if self.name in _VARIABLES:
            return _VARIABLES[self.name]
        names = (self.name, *(name for name in self.others if len(name) > 2))
        return tuple(name.upper().replace("-", "_") for name in names)


_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "config": ("TGI_CONFIG",),  # CONFIG is too common a name, as is VERIFY
    "verify": ("TGI_VERIFY",),
    "api-key": ("API_KEY", "VLLM_API_KEY"),
    "host": ("HOST", "HOSTNAME"),
    "otlp-endpoint": ("OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    "otlp-service-name": ("OTLP_SERVICE_NAME", "OTEL_SERVICE_NAME"),
    "huggingface-hub-cache": (),  # the Hub's library reads it, and its newer name, by itself
}


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, above 0 and up to 1")
    return value


def memory_size(text: str) -> int:
    """Bytes, of `80GiB`, `80GB` or `80G`; G and GiB are 2³⁰, GB is 10⁹."""
    number = text.rstrip("GiBM")
    unit = {"GiB": 2**30, "G": 2**30, "GB": 10**9, "MiB": 2**20, "M": 2**20, "MB": 10**6}.get(
        text[len(number) :]
    )
    try:
        size = int(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory, such as 80GiB or 512MiB")
    return size


def boolean(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value


def one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def log_level(text: str) -> str:
    """TGI's variable may go on about single modules: `info,router=debug`; the first word counts."""
    return one_of("error", "warn", "info", "debug")(text.split(",", maxsplit=1)[0].strip().lower())


def address(text: str) -> str:
    """An address to listen on. Shells and containers put the machine's name into HOST and HOSTNAME."""
    is_ip = bool(text) and all(char in "0123456789abcdefABCDEF.:" for char in text) and not text.isalnum()
    if not is_ip and text != "localhost":
        raise argparse.ArgumentTypeError(f"{text!r} is no address, such as 127.0.0.1, 0.0.0.0 or ::")
    return text


def collector(text: str) -> str:
    """The URL of a collector of traces."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is no collector's URL, such as http://127.0.0.1:4317")
    return text


def _ignored(name: str, why: str, *others: str, is_switch: bool = False) -> Flag:
    return Flag(name, _COMPATIBLE, why, others=others, is_switch=is_switch, effect=Effect.IGNORED)


def _refused(
    name: str, why: str, *others: str, neutral: tuple[str, ...] = (), is_switch: bool = False
) -> Flag:
    return Flag(
        name, _REFUSED, why, others=others, neutral=neutral, is_switch=is_switch, effect=Effect.REFUSED
    )


_MODEL, _LIMITS, _HTTP = "model", "limits", "HTTP"
_ACCESS, _LOGS, _MACHINE = "keys and TLS", "logs and metrics", "machine"
_COMPATIBLE, _REFUSED = "accepted without effect", "refused"


@dataclass(frozen=True)
class Step:
    """What one step may hold."""

    tokens: int
    sequences: int


CPU_STEP: Final = Step(256, 64)  # where nothing else is asked for
GPU_STEP: Final = Step(4096, 256)

QUANTIZE: Final = (
    "awq", "awq_marlin", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq", "exl2",
    "fp8", "gguf", "gptq", "gptq_marlin", "marlin",
)  # fmt: skip
GROUPS: Final = (_MODEL, _LIMITS, _HTTP, _ACCESS, _LOGS, _MACHINE, _COMPATIBLE, _REFUSED)

_tokens = whole(2, 1 << 24)

FLAGS: Final[tuple[Flag, ...]] = (
    Flag(
        "model-id", _MODEL,
        "folder with a Hugging Face checkpoint, a GGUF file, or a Hub id (owner/name, owner/name/file.gguf)",
        others=("model", "model-path"),
    ),
    Flag("revision", _MODEL, "branch, tag or commit of a model on the Hub; by default its main branch"),
    Flag(
        "served-model-name", _MODEL, "the name clients see; by default the Hub id, or the folder's name",
        others=("alias",),
    ),
    Flag("config", _MODEL, "YAML file with any of these options, without their dashes"),
    Flag("chat-template", _MODEL, "file with the chat template to use instead of the model's"),
    Flag(
        "tokenizer-config-path", _MODEL, "tokenizer_config.json to use instead of the model's, for its template"
    ),
    Flag(
        "generation-config", _MODEL,
        "model: what requests leave out is taken from the model's generation_config.json",
        one_of("none", "model", "auto", "vllm"), "none",
    ),
    Flag(
        "parse-special-in-content", _MODEL,
        "special tokens spelled out in chat messages are tokens, as they were in TGI; anybody can then forge roles",
        boolean, False, is_switch=True,
    ),
    Flag("huggingface-hub-cache", _MODEL, "folder for models from the Hub", others=("download-dir",)),
    Flag(
        "verify", _MODEL, "compare all files with the Hub's checksums, or those of a file SHA256SUMS, before loading",
        boolean, False, is_switch=True,
    ),
    Flag(
        "quantize", _MODEL,
        "give a dense model's matrices fewer bits while it loads: bitsandbytes-nf4, bitsandbytes-fp4, fp8, eetq or "
        "bitsandbytes (both int8). A checkpoint that is quantised says so itself; naming its format here is checked",
        one_of(*QUANTIZE), others=("quantization", "-q"),
    ),
    Flag(
        "quality-check", _MODEL, "refuse to serve a model that foretells English no better than counting its words",
        boolean, False, is_switch=True,
    ),
    Flag(
        "load-format", _MODEL, "dummy: random weights, to measure", one_of("auto", "dummy"), "auto"
    ),
    Flag(
        "max-total-tokens", _LIMITS, "tokens of prompt and answer together; by default the model's", _tokens,
        others=("max-model-len", "context-length", "ctx-size"),
    ),
    Flag(
        "max-input-tokens", _LIMITS, "tokens of a prompt; by default all but one of the total",
        whole(1, 1 << 24), others=("max-input-length",),
    ),
    Flag(
        "max-batch-tokens", _LIMITS,
        f"tokens computed in one step; by default {CPU_STEP.tokens} on CPUs, {GPU_STEP.tokens} on GPUs",
        whole(1, 1 << 20), others=("max-batch-prefill-tokens", "max-num-batched-tokens", "chunked-prefill-size"),
    ),
    Flag(
        "max-sequences", _LIMITS,
        f"sequences computed in one step; by default {CPU_STEP.sequences} on CPUs, {GPU_STEP.sequences} on GPUs",
        whole(1, 4096), others=("max-batch-size", "max-num-seqs", "max-running-requests"),
    ),
    Flag(
        "max-batch-total-tokens", _LIMITS, "tokens the KV cache holds at most; by default what memory allows",
        whole(16, 1 << 40),
    ),
    Flag(
        "max-queue", _LIMITS, "requests waiting or running before others are answered 429", whole(1, 1 << 20), 256,
        others=("max-concurrent-requests", "max-queued-requests"),
    ),
    Flag(
        "queue-timeout-s", _LIMITS,
        "seconds a request may wait to be begun, then it is answered 503; by default as long as it takes", seconds,
    ),
    Flag(
        "inter-token-target-ms", _LIMITS,
        "wished milliseconds between two tokens of a stream; prompts are read in pieces that keep it, if they can",
        whole(1, 60_000), 100,
    ),
    Flag("max-best-of", _LIMITS, "largest best_of of TGI's routes", whole(1, 16), 2),
    Flag("max-stop-sequences", _LIMITS, "stop strings of TGI's routes", whole(0, 64), 4),
    Flag("max-top-n-tokens", _LIMITS, "largest top_n_tokens of TGI's routes", whole(0, 20), 5),
    Flag(
        "max-client-batch-size", _LIMITS, "prompts of one request to /v1/completions", whole(1, 64), 64,
        launcher_default=4,
    ),
    Flag("payload-limit", _LIMITS, "bytes of a request's body", whole(1, 1 << 30), 2_000_000),
    Flag(
        "strict-fields", _LIMITS, "refuse requests with fields nobody knows, which are otherwise named in a header",
        boolean, False, is_switch=True,
    ),
    Flag(
        "host", _HTTP, "address to listen on", default="127.0.0.1", others=("hostname",), good=address,
        launcher_default="0.0.0.0",
    ),
    Flag("port", _HTTP, "port to listen on; 0 takes any free one", whole(0, 65535), 3000, others=("-p",)),
    Flag(
        "cors-allow-origin", _HTTP, "origin whose web pages may call this server; * is any; may be repeated",
        default=(), repeats=True, others=("allowed-origins",), launcher_default=("*",),
    ),
    Flag(
        "graceful-termination-timeout", _HTTP, "seconds that running requests get to finish after SIGTERM",
        seconds, 90.0, others=("-g", "shutdown-timeout"),
    ),
    Flag(
        "api-key", _ACCESS, "key that clients must send; may be repeated, and is safer in the environment or a file",
        default=(), repeats=True,
    ),
    Flag("api-key-file", _ACCESS, "file with one key on each line"),
    Flag("admin-api-key", _ACCESS, "key for administrators' routes; may be repeated", default=(), repeats=True),
    Flag("ssl-certfile", _ACCESS, "certificate and its chain, PEM: clients must use https"),
    Flag("ssl-keyfile", _ACCESS, "the certificate's key, PEM, if it is in another file"),
    Flag("prometheus-port", _LOGS, "serve /metrics on this port instead, without keys", whole(0, 65535)),
    Flag("json-output", _LOGS, "log lines are JSON objects", boolean, False, is_switch=True),
    Flag("log-level", _LOGS, "error, warn, info or debug", log_level, "info", good=log_level),
    Flag(
        "otlp-endpoint", _LOGS,
        "OpenTelemetry collector that gets traces: http://HOST:4317 speaks gRPC, http://HOST:4318 HTTP",
        collector,
    ),
    Flag(
        "otlp-service-name", _LOGS, "what traces say the service is called", default="tgi-server",
        launcher_default="text-generation-inference.router",
    ),
    Flag(
        "env", _LOGS, "print the versions of what is installed before starting", boolean, False,
        is_switch=True, others=("-e",), good=boolean,
    ),
    Flag("device", _MACHINE, "auto: a GPU if there is one", one_of("auto", "cpu", "cuda"), "auto"),
    Flag(
        "dtype", _MACHINE, "what GPUs compute in; auto: the checkpoint's type, if of 16 bits. CPUs compute in float32",
        one_of("auto", "bfloat16", "float16", "half", "float32", "float"), "auto",
    ),
    Flag(
        "kv-cache-dtype", _MACHINE, "fp8 (e4m3) halves a GPU's KV cache, at some precision; auto: the type of dtype",
        one_of("auto", "fp8", "fp8_e4m3", "fp8_e4m3fn"), "auto",
    ),
    Flag(
        "cuda-memory-fraction", _MACHINE, "share of a GPU's memory this server may take, of which a reserve stays free",
        share, 1.0, others=("gpu-memory-utilization", "mem-fraction-static"),
    ),
    Flag(
        "deterministic", _MACHINE,
        "on GPUs, bits of a token depend on its own sequence alone with quantised weights, too, at the cost of slower "
        "prompts; with dense and fp8 weights, and on CPUs, they always do",
        boolean, False, is_switch=True,
    ),
    Flag("num-threads", _MACHINE, "threads that compute; by default one per usable core", whole(1, 1024)),
    Flag(
        "cpu-isa", _MACHINE, "instruction set of the CPU's kernels; auto: the best this machine has",
        one_of("auto", "baseline", "avx2", "avx512"), "auto",
    ),
    _ignored("validation-workers", "prompts are encoded in threads as they come"),
    _ignored("speculate", "there is no speculation yet; answers are the same without it"),
    _ignored("trust-remote-code", "a checkpoint's code is never run", is_switch=True),
    _ignored("waiting-served-ratio", "prompts are read in pieces beside running answers"),
    _ignored("max-waiting-tokens", "prompts are read in pieces beside running answers"),
    _ignored("cuda-graphs", "the sizes to capture follow from max-sequences"),
    _ignored("shard-uds-path", "processes are joined by a socket without a name"),
    _ignored("master-addr", "processes are joined by a socket without a name"),
    _ignored("master-port", "processes are joined by a socket without a name"),
    _ignored("disable-custom-kernels", "there are no other kernels", is_switch=True),
    _ignored("watermark-gamma", "a watermark favours half of the vocabulary, as by TGI's default"),
    _ignored("watermark-delta", "a watermark adds 2.0 to logits, as by TGI's default"),
    _ignored("ngrok-authtoken", "there is no tunnel"),
    _ignored("ngrok-edge", "there is no tunnel"),
    _ignored("disable-grammar-support", "there is none yet", is_switch=True),
    _ignored("usage-stats", "nothing is ever sent to anybody"),
    _ignored("max-image-fetch-size", "images are not read yet"),
    _ignored("enable-prefill-logprobs", "they are always there for requests that ask", is_switch=True),
    _refused("sharded", "a server uses one device", neutral=("false", "0")),
    _refused(
        "num-shard", "a server uses one device", "tensor-parallel-size", "-tp", "tp", neutral=("1",)
    ),
    _refused("weights-cache-override", "give that folder as --model-id"),
    _refused("rope-scaling", "write it into the model's config.json"),
    _refused("rope-factor", "write it into the model's config.json"),
    _refused("ngrok", "run ngrok beside the server", neutral=("false", "0"), is_switch=True),
    _refused("lora-adapters", "adapters are not supported; merge one into the model", neutral=("",)),
)  # fmt: skip

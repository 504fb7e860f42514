"""From the values of the options to the two frozen configurations, and to memory plans."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import tgi_kernels
from tgi_server.checkpoint.headers import check_files, check_layers, stored_tensors
from tgi_server.checkpoint.hub import model_folder
from tgi_server.checkpoint.verify import verify
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig, ServerConfig
from tgi_server.errors import StartupError
from tgi_server.flags import CPU_STEP, GPU_STEP
from tgi_server.memory import usable_cores, usable_memory_bytes
from tgi_server.memory_plan import (
    DEGREES,
    PLANNED_TYPES,
    Asked,
    MemoryPlan,
    can_plan,
    can_split,
    plan_memory,
    table,
)
from tgi_server.options import keys_of
from tgi_server.quantization.contents import KNOWN_FORMATS, Contents, contents_of

log = logging.getLogger("tgi_server")

_SAMPLING = ("temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty")

Values = Mapping[str, object]


def configurations(values: Values) -> tuple[ServerConfig, EngineConfig]:
    """What was not given is derived from the model and the machine; fetches the model if need be.

    Raises StartupError for values that do not fit the model, the machine or each other.
    """
    model_id = str(values["model_id"])
    folder = model_folder(model_id, _text(values, "revision"))
    model = ModelConfig.from_folder(folder)
    engine = _engine(values, folder, model)
    return _server(values, folder, model_id, engine), engine


def memory_plans(values: Values, device_memory_bytes: int | None) -> list[MemoryPlan]:
    """One for each number of devices that the model can be split over; fetches at most its config.json.

    device_memory_bytes: of a GPU that need not be here; None: what is free on the device that would be used.
    Raises StartupError for a model that is not served, and for options that do not fit it.
    """
    folder = model_folder(str(values["model_id"]), _text(values, "revision"), only_config=True)
    model = ModelConfig.from_folder(folder)
    contents = _contents(values, folder, model)
    if not can_plan(model, contents):
        raise StartupError(
            f"{folder}: planned are {', '.join(PLANNED_TYPES)}, dense or of {', '.join(KNOWN_FORMATS)}; this is "
            f"{model.model_type!r}{f', of {contents.method}' if contents.method else ''}"
        )
    wanted = str(values["device"])
    on_gpu = (wanted != "cpu") if device_memory_bytes is not None else _device(wanted, values) == "cuda"
    asked = _asked(values, folder, model, on_gpu=on_gpu)
    fraction = float(str(values["cuda_memory_fraction"]))
    if not on_gpu:
        memory_bytes = device_memory_bytes or usable_memory_bytes()
    elif device_memory_bytes:
        memory_bytes = int(device_memory_bytes * fraction)
    else:
        memory_bytes = _free_gpu_bytes(fraction)
    degrees = [ranks for ranks in DEGREES if can_split(model, ranks)] if on_gpu else [1]
    return [
        plan_memory(model, contents, asked, memory_bytes, on_gpu=on_gpu, ranks=ranks) for ranks in degrees
    ]


def _contents(values: Values, folder: Path, model: ModelConfig) -> Contents:
    """What the checkpoint holds; made-up weights are what its config says."""
    tensors = {} if values["load_format"] == "dummy" else stored_tensors(folder)
    return contents_of(model.raw, folder, tensors, str(values["quantize"] or ""))


def _asked(values: Values, folder: Path, model: ModelConfig, *, on_gpu: bool) -> Asked:
    total = _integer(values, "max_total_tokens") or model.max_positions
    if total > model.max_positions:
        raise StartupError(
            f"--max-total-tokens is {total}; {folder.name} was made for {model.max_positions} positions at most"
        )
    step = GPU_STEP if on_gpu else CPU_STEP
    sequences = _integer(values, "max_sequences") or step.sequences
    batch_tokens = _integer(values, "max_batch_tokens") or step.tokens
    return Asked(
        total,
        sequences,
        max(batch_tokens, sequences),
        _integer(values, "max_batch_total_tokens"),
        fp8_cache=values["kv_cache_dtype"] != "auto",
        deterministic=values["deterministic"] is True,
    )


def check_checkpoint(values: Values, engine: EngineConfig) -> None:
    """That the model's files are there and whole, before a process is started to load them.

    Raises StartupError naming the file that is not.
    """
    if engine.dummy_weights:
        return
    check_layers(check_files(engine.model), ModelConfig.from_folder(engine.model).num_layers)
    if values["verify"] is True:
        began = time.monotonic()
        done = verify(engine.model, usable_cores())
        seconds = time.monotonic() - began
        log.info(
            "%d files, %.2f GB, are what their checksums say; %.1f s",
            done.files,
            done.size_bytes / 1e9,
            seconds,
        )
        if done.unknown:
            log.warning("no checksum is known of %s", ", ".join(done.unknown))


def _engine(values: Values, folder: Path, model: ModelConfig) -> EngineConfig:
    device = _device(str(values["device"]), values)
    asked = _asked(values, folder, model, on_gpu=device == "cuda")
    if device == "cuda" and values["cpu_isa"] != "auto":
        raise StartupError(f"--cpu-isa {values['cpu_isa']} is for --device cpu; leave it out on a GPU")
    dtype = _dtype(str(values["dtype"]), device, model)
    if device == "cpu" and asked.fp8_cache:
        raise StartupError(
            f"--kv-cache-dtype {values['kv_cache_dtype']}: on CPUs the KV cache is float32; leave it out there"
        )
    # On a GPU this is a bound: the engine counts, by the same arithmetic, when the weights are there.
    num_pages = asked.cache_tokens // PAGE_TOKENS
    if device == "cpu":
        plan = plan_memory(
            model, _contents(values, folder, model), asked, usable_memory_bytes(), on_gpu=False
        )
        plan.check()
        num_pages = plan.pages
        for line in table([plan]).splitlines():
            log.info("%s", line)
    return EngineConfig(
        model=folder,
        max_total_tokens=asked.total_tokens,
        max_batch_tokens=asked.batch_tokens,
        max_sequences=asked.sequences,
        max_queue=_integer(values, "max_queue"),
        num_pages=num_pages,
        num_threads=_integer(values, "num_threads") or usable_cores(),
        target_s=_integer(values, "inter_token_target_ms") / 1000,
        queue_timeout_s=float(str(values["queue_timeout_s"] or 0)),
        cpu_isa=str(values["cpu_isa"]),
        device=device,
        dtype=dtype,
        fp8_cache=asked.fp8_cache,
        memory_fraction=float(str(values["cuda_memory_fraction"])),
        dummy_weights=values["load_format"] == "dummy",
        quantize=_text(values, "quantize") or "",
        deterministic=asked.deterministic,
        log_level=str(values["log_level"]),
        log_as_json=values["json_output"] is True,
    )


def _server(values: Values, folder: Path, model_id: str, engine: EngineConfig) -> ServerConfig:
    most_input = _integer(values, "max_input_tokens") or engine.max_total_tokens - 1
    if most_input >= engine.max_total_tokens:
        raise StartupError(
            f"--max-input-tokens is {most_input}, but --max-total-tokens is {engine.max_total_tokens}, of which the "
            "answer needs at least one"
        )
    local = Path(model_id).expanduser()
    name = local.resolve().name.removesuffix(".gguf") if local.exists() else model_id
    return ServerConfig(
        model=folder,
        model_id=str(values["served_model_name"] or name),
        host=str(values["host"]),
        port=_integer(values, "port"),
        max_total_tokens=engine.max_total_tokens,
        max_input_tokens=most_input,
        max_queue=engine.max_queue,
        max_best_of=_integer(values, "max_best_of"),
        max_stop_sequences=_integer(values, "max_stop_sequences"),
        max_top_n_tokens=_integer(values, "max_top_n_tokens"),
        max_client_batch_size=_integer(values, "max_client_batch_size"),
        payload_limit_bytes=_integer(values, "payload_limit"),
        grace_s=float(str(values["graceful_termination_timeout"])),
        api_keys=keys_of(_texts(values, "api_key"), values["api_key_file"]),
        admin_keys=_texts(values, "admin_api_key"),
        parse_special_in_content=values["parse_special_in_content"] is True,
        strict_fields=values["strict_fields"] is True,
        prometheus_port=None if values["prometheus_port"] is None else _integer(values, "prometheus_port"),
        cors_allow_origin=_texts(values, "cors_allow_origin"),
        otlp_endpoint=_text(values, "otlp_endpoint"),
        otlp_service_name=str(values["otlp_service_name"]),
        ssl_certfile=_path(values, "ssl_certfile"),
        ssl_keyfile=_path(values, "ssl_keyfile"),
        chat_template=_path(values, "chat_template"),
        tokenizer_config=_path(values, "tokenizer_config_path"),
        sampling_defaults=_sampling_defaults(folder)
        if values["generation_config"] in ("model", "auto")
        else {},
        compute_type="gpu+optimized" if engine.device == "cuda" else "cpu",
    )


def _device(wanted: str, values: Values) -> str:
    """Where to compute; a GPU counts if its driver is there, its kernels were built and it is not hidden."""
    visible = values.get("cuda_visible_devices")
    # CUDA itself stops at the first entry it does not know: nothing, or -1, are the usual ways to hide all.
    if visible is not None and str(visible).split(",", maxsplit=1)[0].strip() in ("", "-1"):
        if wanted == "cuda":
            raise StartupError(
                f"--device cuda: CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU; unset it"
            )
        return "cpu"
    trouble = _gpu_trouble()
    if wanted == "cuda" and trouble:
        raise StartupError(f"--device cuda: {trouble}; mend that or choose --device cpu")
    return "cpu" if wanted == "cpu" or trouble else "cuda"


def _gpu_trouble() -> str | None:
    """Why no GPU can be used, as far as can be told without starting CUDA."""
    if not (Path(tgi_kernels.__file__).parent / "_cuda.so").exists():
        return "the CUDA kernels were not built (TGI_CUDA_ARCHS=90a)"
    return None if Path("/dev/nvidiactl").exists() else "no NVIDIA driver is loaded"


def _dtype(wanted: str, device: str, model: ModelConfig) -> str:
    """What a GPU computes in: what is asked for, else what the checkpoint has, if that is of 16 bits."""
    dtype = {"half": "float16", "float": "float32"}.get(wanted, wanted)
    if device == "cpu":
        if dtype not in ("auto", "float32"):
            log.warning("--dtype %s has no effect: CPUs compute in float32", wanted)
        return EngineConfig.dtype
    if dtype == "float32":
        raise StartupError(
            f"--dtype {wanted}: GPUs compute in bfloat16 or float16; choose one, or --device cpu, which computes in "
            "float32"
        )
    own = model.raw.get("dtype", model.raw.get("torch_dtype"))
    return dtype if dtype != "auto" else "float16" if own == "float16" else "bfloat16"


def _free_gpu_bytes(fraction: float) -> int:
    """Memory of the first GPU that is free now, within this share of all, as its driver's tool says.

    torch would take seconds to ask.
    """
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        free_mib, total_mib = map(int, said.split(","))
        return int(min(free_mib, total_mib * fraction) * 2**20)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise StartupError(
            f"nvidia-smi does not say how much memory is free ({error}); give --device-memory, such as 80GiB"
        ) from None


def _sampling_defaults(folder: Path) -> dict[str, float]:
    """What `generation_config.json` says of sampling, if it is there."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise StartupError(f"{file} holds no object")
    found = {name: content[name] for name in _SAMPLING if content.get(name) is not None}
    wrong = [
        name
        for name, value in found.items()
        if isinstance(value, bool) or not isinstance(value, (int, float))
    ]
    if wrong:
        raise StartupError(f"{file}: {wrong[0]} is {found[wrong[0]]!r}; a number is needed")
    if content.get("do_sample") is False:
        found["temperature"] = 0.0
    return {name: float(value) for name, value in found.items()}


def _integer(values: Values, key: str) -> int:
    """An option's whole number; 0 for one that is not given."""
    value = values[key]
    return value if isinstance(value, int) else 0


def _text(values: Values, key: str) -> str | None:
    return str(values[key]) if values[key] else None


def _texts(values: Values, key: str) -> tuple[str, ...]:
    value = values[key]
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def _path(values: Values, key: str) -> Path | None:
    return Path(str(values[key])).expanduser() if values[key] else None

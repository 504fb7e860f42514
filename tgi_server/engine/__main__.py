"""`python -m tgi_server.engine`: the engine process. Its standard input is a socket to the front end.

The socket is inherited, so there is no address that anybody else could connect to, and the first frame on it is
the configuration, so there is no argument or environment variable to read.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import socket
import sys
from dataclasses import replace

import torch

from tgi_kernels import cpu
from tgi_server.checkpoint.dummy import DummyCheckpoint
from tgi_server.checkpoint.headers import stored_tensors, tensor_files
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig
from tgi_server.engine import collector
from tgi_server.engine.channel import Channel, PeerGone
from tgi_server.engine.engine import Engine, Runner
from tgi_server.engine.failures import DeviceLost
from tgi_server.engine.gpu_runner import DTYPES, GpuRunner, room_bytes
from tgi_server.engine.quality import read_page
from tgi_server.engine.request import EngineStatus
from tgi_server.engine.runner import CpuRunner
from tgi_server.engine.startup import Startup
from tgi_server.errors import StartupError
from tgi_server.layers.weights import Source
from tgi_server.logs import TOO_FEW_PROCESSES, logging_to_stderr
from tgi_server.memory_plan import Asked, can_plan, plan_memory, table
from tgi_server.models import load_model
from tgi_server.quantization.contents import contents_of
from tgi_server.quantization.kv_scales import kv_scale_warning

_PR_SET_PDEATHSIG = 1
_NOT_OURS = (MemoryError, OSError, RuntimeError)  # the device's memory is full, a file cannot be read
_NOT_FOR_US = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

log = logging.getLogger(__name__)


def main() -> int:
    # The front end may die without a word (kill -9): the kernel then ends this process too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Service managers signal every process of a service. The front end then lets requests finish and hangs up; that
    # is this process's sign to end.
    for number in _NOT_FOR_US:
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()))
    try:
        config = channel.receive_config()
        with logging_to_stderr(config.log_level, as_json=config.log_as_json):
            _serve(config, channel)
    except StartupError as error:
        channel.send(EngineStatus(phase="failed", detail=str(error)))
        return 1
    except PeerGone:
        pass
    except DeviceLost:
        # The log is written by now. At once: what Python and torch would free on their way out can only fail, and
        # may hang.
        os._exit(1)
    return 0


def _serve(config: EngineConfig, channel: Channel) -> None:
    """Load the model and compute until the front end is gone (PeerGone). Raises StartupError if it cannot be loaded."""
    channel.send(EngineStatus(phase="loading", detail=f"reading {config.model.name}"))
    try:
        if config.device == "cpu":
            config = set_up_cpu(config)
        startup = Startup(channel.send)
        runner = _runner(config, startup)
        if config.page_ids:
            with startup.phase("quality check"):
                _check_quality(config, runner)
    except _NOT_OURS as error:
        log.exception("loading failed")
        hint = f": {TOO_FEW_PROCESSES}" if os.strerror(errno.EAGAIN) in str(error) else ""
        raise StartupError(f"the model cannot be loaded: {error}{hint}") from None
    log.info("%s", startup.summary())
    collector.settle()
    # While the GPU computes a step the next one is planned; a CPU has nothing to overlap.
    try:
        Engine(config, runner, channel, depth=0 if config.device == "cpu" else 1).run()
    except DeviceLost as error:
        log.critical("%s", error)
        channel.send(EngineStatus(phase="failed", detail=str(error)))
        raise


def _check_quality(config: EngineConfig, runner: Runner) -> None:
    """Raises StartupError if the model foretells text no better than counting does."""
    page = read_page(config, runner, config.page_ids)
    page.require_language()
    log.info(
        "quality check: perplexity %.1f on a page of plain English, %.1f is that of counting its tokens",
        page.perplexity,
        page.by_frequency,
    )


def set_up_cpu(config: EngineConfig) -> EngineConfig:
    """Threads and instruction set of the kernels; the configuration with the set that was chosen.

    Raises StartupError if this CPU has not the one that is asked for.
    """
    torch.set_num_threads(1)  # the kernels have threads of their own, which torch's would disturb
    cpu.set_num_threads(config.num_threads)
    if config.cpu_isa != "auto":
        if config.cpu_isa not in cpu.available_isas():
            raise StartupError(
                f"--cpu-isa {config.cpu_isa}: this CPU has {', '.join(cpu.available_isas())}; choose one of them, "
                "or leave the option out"
            )
        cpu.set_isa(config.cpu_isa)
    log.info("computing on %d threads with the kernels for %s", cpu.num_threads(), cpu.isa())
    return replace(config, cpu_isa=cpu.isa())


def _runner(config: EngineConfig, startup: Startup) -> Runner:
    if config.device == "cpu":
        with startup.phase("weights and cache"):
            return CpuRunner(config, _source(config, startup))
    if not torch.cuda.is_available():
        raise StartupError(
            "CUDA finds no GPU it can use; CUDA_VISIBLE_DEVICES may name one that is not here, or the driver is too "
            f"old for CUDA {torch.version.cuda}. Mend that, or choose --device cpu"
        )
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    model_config = ModelConfig.from_folder(config.model)
    with startup.phase("device"):
        torch.cuda.set_per_process_memory_fraction(config.memory_fraction)
        room = room_bytes(config.memory_fraction, device)
    config = _planned(config, model_config, room)
    with startup.phase("weights"):
        source = _source(config, startup)
        if config.fp8_cache:
            log.warning("%s", kv_scale_warning(source))
        model = load_model(
            source, model_config, device, dtype, config.quantize, deterministic=config.deterministic
        )
        torch.cuda.synchronize(device)
    with startup.phase("cache and graphs"):
        return GpuRunner(config, model, dtype)


def _source(config: EngineConfig, startup: Startup) -> Source:
    """Where the weights come from, its progress watched."""
    if config.dummy_weights:
        return DummyCheckpoint(config.model, torch.device(config.device), DTYPES[config.dtype])
    size_bytes = sum(path.stat().st_size for path in tensor_files(config.model))
    return startup.watched(open_checkpoint(config.model), size_bytes)


def _planned(config: EngineConfig, model: ModelConfig, memory_bytes: int) -> EngineConfig:
    """With as many pages as the plan for a GPU finds room for. Raises StartupError, before anything is loaded, if
    that is too little; models whose weights the plan does not know are counted when they are there.
    """
    tensors = {} if config.dummy_weights else stored_tensors(config.model)
    contents = contents_of(model.raw, config.model, tensors, config.quantize)
    if not can_plan(model, contents):
        return config
    asked = Asked(
        config.max_total_tokens,
        config.max_sequences,
        config.max_batch_tokens,
        config.num_pages * PAGE_TOKENS,
        config.fp8_cache,
        config.deterministic,
    )
    plan = plan_memory(model, contents, asked, memory_bytes, on_gpu=True)
    plan.check()
    for line in table([plan]).splitlines():
        log.info("%s", line)
    return replace(config, num_pages=plan.pages)


if __name__ == "__main__":
    sys.exit(main())

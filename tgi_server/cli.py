"""`tgi-server`: the only place that reads the command line and the environment."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop
from aiohttp import web

import tgi_kernels
from tgi_server.checkpoint.hub import model_folder
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig, ServerConfig
from tgi_server.engine.launch import EngineProcess, start_engine
from tgi_server.errors import StartupError
from tgi_server.http.app import make_app
from tgi_server.memory import usable_cores, usable_memory_bytes
from tgi_server.text.text import Text

_KV_SHARE_OF_MEMORY = (
    0.25  # the rest is for weights, activations and the page cache that holds the checkpoint
)
_LAST_WORDS_S = 1.0  # how long clients get to read that the engine died

log = logging.getLogger("tgi_server")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        server, engine = _configs(args)
        text = Text.from_folder(server.model)
    except StartupError as error:
        print(f"tgi-server: {error}", file=sys.stderr)
        return 2
    return uvloop.run(_serve(server, engine, text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgi-server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Every option may also be given as an environment variable: --max-total-tokens as MAX_TOTAL_TOKENS.",
    )
    option = _OptionFromEnvironment(serve)
    option(
        "--model-id", help="folder with a Hugging Face checkpoint, or a Hub id (owner/name)", required=True
    )
    option("--served-model-name", help="the name clients see; by default the folder's")
    option("--host", default="127.0.0.1", help="address to listen on")
    option("--port", default=3000, type=_whole(0, 65535), help="port to listen on; 0 takes any free one")
    option(
        "--max-total-tokens",
        type=_whole(2, 1 << 24),
        help="prompt and answer of one request; by default the model's",
    )
    option("--max-batch-tokens", default=256, type=_whole(1, 1 << 20), help="tokens computed in one step")
    option("--max-sequences", default=64, type=_whole(1, 4096), help="sequences computed in one step")
    option("--max-queue", default=256, type=_whole(1, 1 << 20), help="requests waiting or running before 429")
    option(
        "--device", default="auto", type=_one_of("auto", "cpu", "cuda"), help="auto: a GPU if there is one"
    )
    option(
        "--load-format",
        default="auto",
        type=_one_of("auto", "dummy"),
        help="dummy: random weights, to measure",
    )
    option("--num-threads", type=_whole(1, 1024), help="threads that compute; by default one per usable core")
    return parser


class _OptionFromEnvironment:
    """add_argument whose default comes from the environment variable of the same name, if that is set."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def __call__(
        self,
        flag: str,
        *,
        help: str,
        required: bool = False,
        default: object = None,
        type: Callable[[str], object] = str,
    ) -> None:
        value = os.environ.get(flag[2:].upper().replace("-", "_"))
        # HOST and PORT of an unrelated tool must not stop the server with a traceback: argparse checks strings.
        self._parser.add_argument(
            flag,
            help=help,
            type=type,
            default=default if value is None else value,
            required=required and value is None,
        )


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def _configs(args: argparse.Namespace) -> tuple[ServerConfig, EngineConfig]:
    """The two frozen configurations; what was not given is derived from the model and the machine."""
    folder = model_folder(args.model_id)
    model = ModelConfig.from_folder(folder)
    total = args.max_total_tokens or model.max_positions
    if total > model.max_positions:
        raise StartupError(
            f"--max-total-tokens is {total}; {folder.name} was made for {model.max_positions} positions at most"
        )
    device = _device(args.device)
    engine = EngineConfig(
        model=folder,
        max_total_tokens=total,
        max_batch_tokens=max(args.max_batch_tokens, args.max_sequences),
        max_sequences=args.max_sequences,
        max_queue=args.max_queue,
        num_pages=0 if device == "cuda" else _num_pages(model, total, args.max_sequences),
        num_threads=args.num_threads or usable_cores(),
        device=device,
        dummy_weights=args.load_format == "dummy",
    )
    server = ServerConfig(
        model=folder,
        model_id=args.served_model_name
        or (folder.resolve().name if str(folder) == args.model_id else args.model_id),
        host=args.host,
        port=args.port,
        max_total_tokens=total,
        max_queue=args.max_queue,
    )
    return server, engine


def _device(wanted: str) -> str:
    """Where to compute; a GPU counts if its driver is there and its kernels were built."""
    built = (Path(tgi_kernels.__file__).parent / "_cuda.so").exists()
    driver = Path("/dev/nvidiactl").exists()
    if wanted == "cuda" and not (built and driver):
        missing = (
            "no NVIDIA driver is loaded" if built else "the CUDA kernels were not built (TGI_CUDA_ARCHS=90a)"
        )
        raise StartupError(f"--device cuda: {missing}; mend that or choose --device cpu")
    return "cuda" if wanted != "cpu" and built and driver else "cpu"


def _num_pages(model: ModelConfig, total_tokens: int, max_sequences: int) -> int:
    """Pages of KV cache (fp32): what memory allows, never more than all sequences could fill."""
    page_bytes = model.num_layers * 2 * model.num_kv_heads * PAGE_TOKENS * model.head_dim * 4
    memory = usable_memory_bytes()
    per_sequence = -(-total_tokens // PAGE_TOKENS)
    pages = min(int(memory * _KV_SHARE_OF_MEMORY) // page_bytes, per_sequence * max_sequences)
    if pages < per_sequence:
        fits = pages * PAGE_TOKENS
        raise StartupError(
            f"{total_tokens} tokens of KV cache take {per_sequence * page_bytes / 2**20:.0f} MiB, but of "
            f"{memory / 2**20:.0f} MiB usable memory it may take {_KV_SHARE_OF_MEMORY:.0%}; "
            f"--max-total-tokens {fits} would fit"
        )
    return pages


async def _serve(config: ServerConfig, engine_config: EngineConfig, text: Text) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    engine = await start_engine(engine_config)
    runner = web.AppRunner(make_app(config, engine.client, text), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, shutdown_timeout=_LAST_WORDS_S)
        try:
            await site.start()
        except OSError as error:
            print(
                f"tgi-server: cannot listen on {config.host}:{config.port}: {error.strerror}; "
                "choose another with --port",
                file=sys.stderr,
            )
            return 2
        return await _until_end(engine, runner, config, stop)
    finally:
        await runner.cleanup()
        await engine.stop()


async def _until_end(
    engine: EngineProcess, runner: web.AppRunner, config: ServerConfig, stop: asyncio.Event
) -> int:
    """Announce readiness, then wait for a signal or for the engine's death; the exit status."""
    announcing = asyncio.create_task(_announce(engine, runner, config))
    engine.ended.add_done_callback(lambda _: stop.set())
    await stop.wait()
    announcing.cancel()
    if not engine.ended.done():
        log.info("stopping")
        return 0
    log.error("%s; the service ends", engine.client.status.detail)
    await asyncio.sleep(_LAST_WORDS_S)
    return 1


async def _announce(engine: EngineProcess, runner: web.AppRunner, config: ServerConfig) -> None:
    if not await engine.client.wait_ready():
        return
    address = runner.addresses[0]
    url = f"http://{address[0]}:{address[1]}"
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    print(
        f"{config.model_id} is ready on {url}\nTry: curl {url}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d '{body}'",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tgi_server.engine`: the engine process. Its standard input is a socket to the front end.

The socket is inherited, so there is no address that anybody else could connect to, and the first frame on it is
the configuration, so there is no argument or environment variable to read.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import sys

import torch

from tgi_kernels.cpu import set_num_threads
from tgi_server.engine.channel import Channel, PeerGone
from tgi_server.engine.engine import Engine
from tgi_server.engine.request import EngineStatus
from tgi_server.engine.runner import CpuRunner
from tgi_server.errors import StartupError

_PR_SET_PDEATHSIG = 1


def main() -> int:
    # The front end may die without a word (kill -9): the kernel then ends this process too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()))
    try:
        config = channel.receive_config()
        channel.send(EngineStatus(phase="loading", detail=f"reading {config.model.name}"))
        torch.set_num_threads(config.num_threads)
        set_num_threads(config.num_threads)
        Engine(config, CpuRunner(config), channel).run()
    except PeerGone:
        return 0
    except StartupError as error:
        channel.send(EngineStatus(phase="failed", detail=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

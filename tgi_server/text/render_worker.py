"""`python -m tgi_server.text.render_worker`: renders chat templates for a front end, within hard limits.

A template is a program that came with a checkpoint, and what it does depends on what clients send. Here it may
loop or grow as it likes: an alarm ends the process, its memory is capped, and the front end starts another.
Frames on standard input and output are a little-endian length and msgpack: first a Setup, then Jobs.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from typing import BinaryIO, Final

import msgspec

from tgi_server.errors import UserError
from tgi_server.text.template import ChatTemplate

HEADER: Final = struct.Struct("<I")


class Setup(msgspec.Struct, frozen=True):
    """Templates by name, the special tokens they may write, and the limits of each rendering."""

    sources: dict[str, str]
    special_tokens: dict[str, str]
    time_s: float
    output_chars: int
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """The arguments of `ChatTemplate.render`."""

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] = []
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    extra: dict[str, object] = {}


class Rendered(msgspec.Struct, frozen=True):
    """A prompt, or why there is none and which field is to blame."""

    prompt: str = ""
    error: str = ""
    field: str = ""


def main() -> int:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    setup = msgspec.msgpack.decode(_read(source), type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    template = ChatTemplate(setup.sources, setup.special_tokens)
    _write(sink, Rendered())  # ready
    decoder = msgspec.msgpack.Decoder(Job)
    while frame := _read(source):
        # SIGALRM's default action ends the process even inside one long call into C.
        signal.setitimer(signal.ITIMER_REAL, setup.time_s)
        answer = _render(template, decoder.decode(frame), setup.output_chars)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(sink, answer)
    return 0


def _render(template: ChatTemplate, job: Job, output_chars: int) -> Rendered:
    try:
        prompt = template.render(
            job.messages,
            tools=job.tools,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            extra=job.extra,
            most_chars=output_chars,
        )
    except UserError as error:
        return Rendered(error=error.message, field=error.field or "")
    except MemoryError:
        return Rendered(
            error="the model's chat template needs too much memory for these messages", field="messages"
        )
    return Rendered(prompt)


def _write(sink: BinaryIO, answer: Rendered) -> None:
    payload = msgspec.msgpack.encode(answer)
    sink.write(HEADER.pack(len(payload)) + payload)
    sink.flush()


def _read(source: BinaryIO) -> bytes:
    """One frame; nothing when the front end has hung up."""
    header = source.read(HEADER.size)
    return source.read(HEADER.unpack(header)[0]) if len(header) == HEADER.size else b""


if __name__ == "__main__":
    sys.exit(main())

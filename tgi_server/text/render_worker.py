"""`python -m tgi_server.text.render_worker`: renders chat templates for a front end, within hard limits.

A template is a program that came with a checkpoint, and what it does depends on what clients send. Here it may
loop or grow as it likes: an alarm ends the process, its memory is capped, and the front end starts another.
Frames on standard input and output are a little-endian length and msgpack: first a Setup, then Jobs.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from tgi_server.errors import UserError
from tgi_server.text.template import ChatTemplate

HEADER: Final = struct.Struct("<I")

_STDIN, _STDOUT = 0, 1
_READ_BYTES = 1 << 16  # what is read ahead counts as the worker's memory
_HELD_S = 0.002  # how long an answer waits for those of the jobs that came with it
_LONG_BYTES = 1 << 14  # a job this long may take a while: no answer waits for it


class Setup(msgspec.Struct, frozen=True):
    """Templates by name, the special tokens they may write, and the limits of each rendering."""

    sources: dict[str, str]
    special_tokens: dict[str, str]
    time_s: float
    output_chars: int
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """The arguments of `ChatTemplate.render`."""

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    extra: Mapping[str, object] = {}


class Rendered(msgspec.Struct, frozen=True):
    """A prompt, or why there is none and which field is to blame."""

    prompt: str = ""
    error: str = ""
    field: str = ""


def main() -> int:
    signal.signal(
        signal.SIGPIPE, signal.SIG_DFL
    )  # a front end that ends while this starts wants no traceback
    frames = _frames()
    setup = msgspec.msgpack.decode(next(frames)[0], type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    template = ChatTemplate(setup.sources, setup.special_tokens)
    answers = _Answers()
    answers.add(Rendered())
    answers.send()  # ready
    decoder = msgspec.msgpack.Decoder(Job)
    for batch in frames:
        for frame in batch:
            if len(frame) > _LONG_BYTES:
                answers.send()
            # SIGALRM's default action ends the process even inside one long call into C.
            signal.setitimer(signal.ITIMER_REAL, setup.time_s)
            answers.add(_render(template, decoder.decode(frame), setup.output_chars))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.send()
    return 0


class _Answers:
    """Answers on their way out: those of jobs that came together go together, unless one of them takes its time."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._waiting = bytearray()
        self._since_s = 0.0

    def add(self, answer: Rendered) -> None:
        if not self._waiting:
            self._since_s = time.monotonic()
        payload = self._encoder.encode(answer)
        self._waiting += HEADER.pack(len(payload))
        self._waiting += payload
        if time.monotonic() - self._since_s > _HELD_S:
            self.send()

    def send(self) -> None:
        while self._waiting:
            del self._waiting[: os.write(_STDOUT, self._waiting)]


def _frames() -> Iterator[list[bytes]]:
    """Frames as they come, those of one read together; ends when the front end has hung up."""
    waiting = bytearray()
    buffer = bytearray(_READ_BYTES)  # one for good: new ones tear the heap, which then grows with every job
    while count := os.readv(_STDIN, [buffer]):
        waiting += memoryview(buffer)[:count]
        frames = []
        at = 0
        while len(waiting) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(waiting, at)
            end = at + HEADER.size + length
            if len(waiting) < end:
                break
            frames.append(bytes(waiting[at + HEADER.size : end]))
            at = end
        del waiting[:at]
        if frames:
            yield frames


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


if __name__ == "__main__":
    sys.exit(main())

"""What can go wrong with a request, and what each API flavour says about it."""

from __future__ import annotations

from enum import Enum
from typing import Final


class ErrorKind(Enum):
    """Why a request was not answered."""

    UNPARSABLE = "unparsable"  # the body is not JSON of the right types
    INVALID = "invalid"  # a field, or a combination of fields, is out of bounds or unsupported
    TEMPLATE = "template"  # the model's chat template refuses the messages, or there is none
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"  # a good key, but not for this route
    NOT_FOUND = "not_found"  # no such model or route
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TIMEOUT = "timeout"  # the client did not send its request in time
    TOO_LARGE = "too_large"  # the body is over the payload limit
    ENCODED = "encoded"  # the body is compressed
    OVERLOADED = "overloaded"  # the queue is full; trying later helps
    WAITED = "waited"  # the request was not begun within the limit of waiting; trying later helps
    GENERATION = "generation"  # this request's computation failed; others go on
    INCOMPLETE = "incomplete"  # the answer broke off
    UNAVAILABLE = "unavailable"  # the engine is loading, draining or gone
    INTERNAL = "internal"  # a defect of ours


class Flavour(Enum):
    """Whose error shape an endpoint speaks."""

    TGI = "tgi"
    OPENAI = "openai"


# HTTP status and the flavour's own word for the kind: `error_type` for TGI, `type` for OpenAI.
STATUS: Final[dict[ErrorKind, dict[Flavour, tuple[int, str]]]] = {
    ErrorKind.UNPARSABLE: {Flavour.TGI: (400, "validation"), Flavour.OPENAI: (400, "invalid_request_error")},
    ErrorKind.INVALID: {Flavour.TGI: (422, "validation"), Flavour.OPENAI: (400, "invalid_request_error")},
    ErrorKind.TEMPLATE: {
        Flavour.TGI: (422, "template_error"),
        Flavour.OPENAI: (400, "invalid_request_error"),
    },
    ErrorKind.UNAUTHORIZED: {
        Flavour.TGI: (401, "unauthorized"),
        Flavour.OPENAI: (401, "authentication_error"),
    },
    ErrorKind.FORBIDDEN: {Flavour.TGI: (403, "forbidden"), Flavour.OPENAI: (403, "permission_error")},
    ErrorKind.NOT_FOUND: {Flavour.TGI: (404, "not_found"), Flavour.OPENAI: (404, "not_found_error")},
    ErrorKind.METHOD_NOT_ALLOWED: {
        Flavour.TGI: (405, "method_not_allowed"),
        Flavour.OPENAI: (405, "invalid_request_error"),
    },
    ErrorKind.TIMEOUT: {Flavour.TGI: (408, "timeout"), Flavour.OPENAI: (408, "timeout_error")},
    ErrorKind.TOO_LARGE: {Flavour.TGI: (413, "validation"), Flavour.OPENAI: (413, "invalid_request_error")},
    ErrorKind.ENCODED: {Flavour.TGI: (415, "validation"), Flavour.OPENAI: (415, "invalid_request_error")},
    ErrorKind.OVERLOADED: {Flavour.TGI: (429, "overloaded"), Flavour.OPENAI: (429, "rate_limit_error")},
    ErrorKind.WAITED: {Flavour.TGI: (503, "timeout"), Flavour.OPENAI: (503, "timeout_error")},
    ErrorKind.GENERATION: {Flavour.TGI: (424, "generation"), Flavour.OPENAI: (500, "server_error")},
    ErrorKind.INCOMPLETE: {
        Flavour.TGI: (500, "incomplete_generation"),
        Flavour.OPENAI: (500, "server_error"),
    },
    ErrorKind.UNAVAILABLE: {Flavour.TGI: (503, "unavailable"), Flavour.OPENAI: (503, "server_error")},
    ErrorKind.INTERNAL: {Flavour.TGI: (500, "internal"), Flavour.OPENAI: (500, "server_error")},
}

# OpenAI's `code` is a word that programs compare; where it has none of its own, the kind's is sent.
_OPENAI_CODES: Final[dict[ErrorKind, str]] = {
    ErrorKind.UNAUTHORIZED: "invalid_api_key",
    ErrorKind.OVERLOADED: "rate_limit_exceeded",
}


class UserError(Exception):
    """A request cannot be answered; `message` is written for whoever sent it.

    `field` names the offending field as the client spelled it (`parameters.top_k`), if there is one.
    """

    def __init__(
        self, kind: ErrorKind, message: str, field: str | None = None, code: str | None = None
    ) -> None:
        """code: OpenAI's word for just this case, if it has one."""
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.field = field
        self.code = code


class StartupError(Exception):
    """The service cannot start as configured; the message says what to change."""


def status_of(kind: ErrorKind, flavour: Flavour) -> int:
    return STATUS[kind][flavour][0]


def body_of(error: UserError, flavour: Flavour) -> dict[str, object]:
    """The JSON body for `error`, in the shape clients of `flavour` parse."""
    _, word = STATUS[error.kind][flavour]
    if flavour is Flavour.TGI:
        return {"error": error.message, "error_type": word}
    code = error.code or _OPENAI_CODES.get(error.kind, error.kind.value)
    return {"error": {"message": error.message, "type": word, "param": error.field, "code": code}}

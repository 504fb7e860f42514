"""Taking the addresses to listen on, before anything that takes time: a port that is in use is known at once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from tgi_server.errors import StartupError


@dataclass(frozen=True)
class Addresses:
    """Bound sockets, not listening yet: a client that comes too early is refused, it does not wait in vain."""

    service: Sequence[socket.socket]
    metrics: Sequence[socket.socket] = ()  # where `/metrics` has a port of its own


def take_addresses(host: str, port: int, metrics_port: int | None) -> Addresses:
    """Bind every address of `host`. Raises StartupError naming host, port and what to change."""
    if metrics_port is not None and metrics_port == port != 0:
        raise StartupError(f"--port and --prometheus-port are both {port}; choose two")
    service = bound_sockets(host, port)
    return Addresses(
        service, () if metrics_port is None else bound_sockets(host, metrics_port, "prometheus-port")
    )


def bound_sockets(host: str, port: int, flag: str = "port") -> list[socket.socket]:
    """One socket for each address that `host` means; port 0 takes any, the same for all of them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is no address of this machine: {error.strerror}") from None
    sockets: list[socket.socket] = []
    trouble: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, kind, protocol, host, (*address[:1], port, *address[2:])))
        except OSError as error:
            # localhost names ::1, too, where there is no IPv6: one address that works is enough.
            trouble = error
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                break
            continue
        port = sockets[-1].getsockname()[1]
    if trouble is not None and (not sockets or trouble.errno == errno.EADDRINUSE):
        raise why_not(host, port, flag, trouble)
    return sockets


def _bound(family: int, kind: int, protocol: int, host: str, address: tuple[str | int, ...]) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` is every address of either kind, as people expect; another IPv6 address is itself alone.
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def why_not(host: str, port: int, flag: str, error: OSError) -> StartupError:
    """What to tell who asked for an address that cannot be had."""
    what = f"cannot listen on {f'[{host}]' if ':' in host else host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"{what}: port {port} is in use; stop what listens there, or choose another --{flag}"
        )
    if error.errno == errno.EACCES:
        return StartupError(
            f"{what}: this user may not take a port below 1024; choose a higher --{flag}, or allow it "
            "(sysctl net.ipv4.ip_unprivileged_port_start)"
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return StartupError(
            f"{what}: this machine has no such address; choose another --host, such as 127.0.0.1, 0.0.0.0 or ::"
        )
    return StartupError(f"{what}: {error.strerror}; choose another --{flag} or --host")

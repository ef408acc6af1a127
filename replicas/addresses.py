"""Sockets at addresses of either family."""

import socket


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str) -> socket.socket:
    """On a free port of this address only."""
    return socket.create_server((host, 0), family=family_of(host))

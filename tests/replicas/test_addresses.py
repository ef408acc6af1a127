import socket

import pytest

from trimode.replicas.addresses import family_of, listen


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("localhost", socket.AF_INET)],
)
def test_an_address_tells_its_family(host: str, family: socket.AddressFamily) -> None:
    assert family_of(host) is family


def test_a_listener_is_on_its_own_address_only() -> None:
    with listen("127.0.0.1") as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and port > 0
        socket.create_connection((host, port), timeout=5).close()

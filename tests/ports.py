"""Ports for a test's ranks, which no other test worker takes between the choice and the use.

The kernel gives away the same free port again at once, also to the other worker of pytest-xdist. So
each worker has a range of its own, below those that the kernel gives away.
"""

import itertools
import os
import socket

FIRST, PER_WORKER = 21000, 2000
_numbers = itertools.count(os.getpid() * 7)


def free_port() -> int:
    """A port of this worker's range that nobody listens on now, another one each time."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in itertools.islice(_numbers, PER_WORKER):
        port = FIRST + PER_WORKER * (worker % 5) + number % PER_WORKER
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {FIRST} on is free")

"""A reverse proxy for tests: it forwards each TCP connection to the reachable server with the fewest connections."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress


class Relay:
    """Listens on a free port of the loopback interface.

    Args:
        ports: ports of the servers.

    Attributes:
        port: the port of the proxy.
    """

    def __init__(self, *ports: int) -> None:
        self._open: Counter[int] = Counter(dict.fromkeys(ports, 0))
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop listening, and end the connections: a test that failed has left them open."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                robot, _ = self._listener.accept()
            except OSError:
                return
            server = self._connect()
            if server is None:
                robot.close()
                continue
            self._sockets += [robot, server]
            self._threads.append(threading.Thread(target=self._both_ways, args=(robot, server), daemon=True))
            self._threads[-1].start()

    def _both_ways(self, robot: socket.socket, server: socket.socket) -> None:
        with robot, server:
            back = threading.Thread(target=self._pass, args=(server, robot), daemon=True)
            back.start()
            self._pass(robot, server)
            back.join()

    def _connect(self) -> socket.socket | None:
        for port, _ in sorted(self._open.items(), key=lambda item: item[1]):
            with suppress(OSError):
                server = socket.create_connection(("127.0.0.1", port))
                self._open[port] += 1
                return server
        return None

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

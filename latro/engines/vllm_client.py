"""Request JSON over HTTP from a server that may be slow, broken or another program altogether.

Each request has one time limit, from the connection to the last byte however slowly bytes arrive,
and one size limit. Redirections are not followed. Messages do not show an answer's content, which
may repeat prompts, except for the reason that an error states.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from latro.terminal import one_line

SERVE = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"

LARGEST_ANSWER = 1 << 24
"""Size limit in bytes for an answer without samples."""

ATTEMPTS = 3
"""Times that a request is sent where the connection breaks."""
_LONGEST_REASON = 200

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A part of a server's answer."""

    value: Any
    """The JSON value."""
    source: str
    """The address that was requested."""
    place: str = ""
    """The position in the answer, ".choices[0]"."""

    def at(self, *keys: str | int) -> Answer:
        """Return the part at these keys and indices.

        Raises:
            ConnectionError: there is no such part.
        """
        value, place = self.value, self.place
        for key in keys:
            place += f"[{key}]" if isinstance(key, int) else f".{key}"
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError) as error:
                raise ConnectionError(
                    f"{self.source}: JSON of another shape than vLLM's: nothing at {place}"
                ) from error
        return Answer(value, self.source, place)

    def of(self, kind: type[T]) -> T:
        """Return the value if its type is exactly `kind`: true is not a number.

        Raises:
            ConnectionError: it is of another type.
        """
        if type(self.value) is not kind:
            raise ConnectionError(
                f"{self.source}: JSON of another shape than vLLM's: expected {kind.__name__} at "
                f"{self.place}, got {type(self.value).__name__}"
            )
        return self.value

    def parts(self) -> list[Answer]:
        """Return the elements of a list.

        Raises:
            ConnectionError: the value is not a list.
        """
        return [self.at(index) for index in range(len(self.of(list)))]


class Hangup:
    """Cancels requests from another thread: those in progress, and those that would begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._happened = threading.Event()

    def __call__(self) -> None:
        """Cancel the requests."""
        with self._lock:
            self._happened.set()
            for open_socket in self._sockets:
                _shut(open_socket)

    @property
    def happened(self) -> bool:
        """Return whether requests were cancelled."""
        return self._happened.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep for so many seconds, or until requests are cancelled."""
        self._happened.wait(seconds)

    @contextmanager
    def reaches(self, open_socket: socket.socket) -> Iterator[None]:
        """Let a cancellation within the block end what waits for this socket."""
        with self._lock:
            self._sockets.add(open_socket)
            if self.happened:
                _shut(open_socket)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(open_socket)


class Client:
    """Sends requests to one server.

    Attributes:
        url: the server's address, without a slash at its end.

    Args:
        url: the server's address, "http://127.0.0.1:8000".

    Raises:
        ValueError: the address is malformed, or has a user and password: those would be written
            into checkpoints and shown by trackers with the run's settings.
    """

    def __init__(self, url: str) -> None:
        parts = _parsed(url)
        if parts is None:
            # Even in a malformed URL, the text before an "@" may be a password: do not show it.
            before, at, behind = url.rpartition("@")
            shown = f"{before.partition('://')[0]}://…@{behind}" if at else url
            raise ValueError(
                f"vllm_url: expected http://HOST:PORT, without user, password and query, got "
                f"{shown!r}"
            )
        self.url = url.rstrip("/")
        self._parts = parts
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    def request(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float,
        largest: int = LARGEST_ANSWER,
        hangup: Hangup | None = None,
        attempts: int = ATTEMPTS,
    ) -> Answer:
        """Return the server's answer to a POST of `body`, or to a GET if there is no body.

        A broken connection is tried again, since repeating most requests does no harm. A refused
        one is not, since a server that restarts has lost its weights.

        Args:
            path: the path after the server's URL.
            body: a JSON object.
            timeout: seconds for the whole request, including further attempts.
            largest: size limit of the answer, in bytes.
            hangup: can cancel the request.
            attempts: how often it is sent where the connection breaks.

        Raises:
            ConnectionError: there is no answer in time; or the answer is too large, not JSON, a
                redirection or a server error.
            ValueError: the server has no such path, or rejects the request.
        """
        where = f"{self.url}{path}"
        hangup = hangup or Hangup()
        deadline = time.monotonic() + timeout
        for attempt in range(1, attempts + 1):
            try:
                status, content = self._send(
                    path, body=body, deadline=deadline, largest=largest, hangup=hangup
                )
                break
            except (OSError, UnicodeError, http.client.HTTPException) as error:
                if hangup.happened:
                    raise ConnectionError(f"{where}: ended, as another request failed") from error
                # Without an errno the timeout is the socket's own, else the system's.
                late = isinstance(error, TimeoutError) and error.errno is None
                if late or time.monotonic() >= deadline:
                    raise ConnectionError(f"{where}: no answer in {timeout:g} seconds") from error
                final = isinstance(error, ConnectionRefusedError | UnicodeError)
                if final or attempt == attempts:
                    raise ConnectionError(f"{where}: {_fault(error)}") from error
                hangup.wait(min(float(attempt), deadline - time.monotonic()))
        if len(content) > largest:
            raise ConnectionError(f"{where}: the answer has more than {largest:,} bytes")
        if status == http.client.NOT_FOUND:
            raise ValueError(
                f"vllm_url: {self.url} has no {path}{_reason(content)}; it takes vLLM 0.32 or "
                f"newer, started as `{SERVE}`"
            )
        if status in range(400, 500):
            raise ValueError(f"vllm_url: {where} refuses the request: {status}{_reason(content)}")
        if status in range(300, 400):
            raise ConnectionError(f"{where}: {status}, a redirection, which is not followed")
        if status != http.client.OK:
            raise ConnectionError(f"{where}: {status}{_reason(content)}")
        try:
            return Answer(json.loads(content), where)
        except (ValueError, RecursionError) as error:
            raise ConnectionError(
                f"{where}: expected JSON, got {len(content):,} bytes of something else"
            ) from error

    def own_address(self, timeout: float) -> str:
        """Return the address of this machine by which it reaches the server.

        Raises:
            ConnectionError: there is no connection in so many seconds.
        """
        try:
            with socket.create_connection(self._host_and_port(), timeout) as open_socket:
                address: str = open_socket.getsockname()[0]
                return address
        except (OSError, UnicodeError) as error:
            raise ConnectionError(f"{self.url}: {error}") from error

    def _host_and_port(self) -> tuple[str, int]:
        return str(self._parts.hostname), self._parts.port or (443 if self._tls else 80)

    def _send(
        self,
        path: str,
        body: dict[str, Any] | None,
        deadline: float,
        largest: int,
        hangup: Hangup,
    ) -> tuple[int, bytes]:
        """Return the status and the content, cut one byte after `largest`."""
        host, port = self._host_and_port()
        left = max(deadline - time.monotonic(), 1e-3)
        open_socket = socket.create_connection((host, port), left)
        if self._tls is not None:
            open_socket = self._tls.wrap_socket(
                open_socket, server_hostname=host, do_handshake_on_connect=False
            )
        # The socket's own timeout is per read, so single bytes now and then would outlast it.
        timer = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [open_socket])
        timer.daemon = True
        timer.start()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = open_socket
        try:
            with hangup.reaches(open_socket):
                if isinstance(open_socket, ssl.SSLSocket):
                    open_socket.do_handshake()
                path = self._parts.path.rstrip("/") + path
                # No compression: a few compressed bytes could expand to any size.
                headers = {"Accept-Encoding": "identity", "Connection": "close"}
                if body is None:
                    connection.request("GET", path, headers=headers)
                else:
                    headers["Content-Type"] = "application/json"
                    connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
                content = response.read(largest + 1)
                # `read` with a size does not check that all announced bytes came.
                if response.length and len(content) <= largest:
                    raise http.client.IncompleteRead(b"", response.length)
                # An answer without a length ends with the connection, also if that was cut here.
                if hangup.happened or time.monotonic() >= deadline:
                    raise TimeoutError
                return response.status, content
        finally:
            timer.cancel()
            connection.close()


def _parsed(url: str) -> SplitResult | None:
    """Return the parts of a URL; None: it is not the address of a server."""
    try:
        parts = urlsplit(url)
        whole = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    plain = re.fullmatch(r"[!-~]+", url) and not parts.query and not parts.fragment
    alone = "@" not in url and "?" not in url and "#" not in url
    return parts if whole and plain and alone and parts.scheme in ("http", "https") else None


def _shut(open_socket: socket.socket) -> None:
    """End every read and write of a socket, from another thread."""
    # The server may have closed it already. TLS's own `shutdown` would disturb the reading thread.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


def _fault(error: Exception) -> str:
    """Describe what broke a connection, without the content that most HTTP exceptions quote."""
    if isinstance(error, http.client.HTTPException) and not isinstance(
        error, http.client.RemoteDisconnected | http.client.IncompleteRead
    ):
        return "the answer is no HTTP"
    return str(error)


def _reason(content: bytes) -> str:
    """Return the reason that an error answer states, after a colon; "" where it states none."""
    try:
        stated = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    # vLLM writes {"error": {"message": …}}, the web framework below it {"detail": …}.
    for name in ("error", "message", "detail"):
        if isinstance(stated, dict):
            stated = stated.get(name, stated)
    return f": {one_line(stated)[:_LONGEST_REASON]}" if isinstance(stated, str) else ""

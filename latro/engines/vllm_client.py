"""JSON over HTTP from a server that may be slow, broken or another program altogether.

A request has one limit of time, from the connection to the last byte, however the bytes drip in,
and one of size. Redirections are not followed. No message has an answer's content in it, which may
repeat prompts, but for the reason that an error states.
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
"""Bytes; of an answer that has no samples in it."""

_ATTEMPTS = 3
_LONGEST_REASON = 200

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A part of what a server answered."""

    value: Any
    """As JSON has it."""
    source: str
    """The address that was asked."""
    place: str = ""
    """Where in the answer it stands, ".choices[0]"."""

    def at(self, *keys: str | int) -> Answer:
        """Return the part at these keys and indices.

        Raises:
            ConnectionError: there is none.
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
        """Return the value, which is of this very type: true is no number.

        Raises:
            ConnectionError: it is not.
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
            ConnectionError: it is none.
        """
        return [self.at(index) for index in range(len(self.of(list)))]


class Hangup:
    """Ends requests from another thread: those under way, and those that would begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._happened = threading.Event()

    def __call__(self) -> None:
        """End them."""
        with self._lock:
            self._happened.set()
            for open_socket in self._sockets:
                _shut(open_socket)

    @property
    def happened(self) -> bool:
        """Whether requests were ended."""
        return self._happened.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep so long, or until requests are ended."""
        self._happened.wait(seconds)

    @contextmanager
    def reaches(self, open_socket: socket.socket) -> Iterator[None]:
        """Within the block it can end what waits for this socket."""
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
    """Asks one server.

    Attributes:
        url: of the server, without a slash at its end.

    Args:
        url: "http://127.0.0.1:8000".

    Raises:
        ValueError: it is of another form. A user and password have no place in it, since a run's
            settings are written down in its checkpoints and shown by trackers.
    """

    def __init__(self, url: str) -> None:
        parts = _parsed(url)
        if parts is None:
            # What stands before an "@" may be a password, wherever a malformed URL has it.
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
    ) -> Answer:
        """Return what the server answers to a POST of `body`, or to a GET where there is none.

        A connection that breaks is tried again: each request has one meaning however often it
        comes. One that is refused is not, since a server that comes back has lost its weights.

        Args:
            path: behind the server's URL.
            body: JSON.
            timeout: seconds for all of it, further attempts included.
            largest: bytes that the answer may have.
            hangup: can end it.

        Raises:
            ConnectionError: no answer, one that took too long or is too large, no JSON, a
                redirection or an error of the server's.
            ValueError: the server has no such path, or refuses the request.
        """
        where = f"{self.url}{path}"
        hangup = hangup or Hangup()
        deadline = time.monotonic() + timeout
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                status, content = self._send(path, body, deadline, largest, hangup)
                break
            except (OSError, UnicodeError, http.client.HTTPException) as error:
                if hangup.happened:
                    raise ConnectionError(f"{where}: ended, as another request failed") from error
                # Without a number it is the socket's own limit, else the system's for a connection.
                late = isinstance(error, TimeoutError) and error.errno is None
                if late or time.monotonic() >= deadline:
                    raise ConnectionError(f"{where}: no answer in {timeout:g} seconds") from error
                final = isinstance(error, ConnectionRefusedError | UnicodeError)
                if final or attempt == _ATTEMPTS:
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

    def _send(
        self,
        path: str,
        body: dict[str, Any] | None,
        deadline: float,
        largest: int,
        hangup: Hangup,
    ) -> tuple[int, bytes]:
        """Return the status, and of the content at most one byte more than `largest`."""
        host, secure = self._parts.hostname, self._tls is not None
        port = self._parts.port or (443 if secure else 80)
        left = max(deadline - time.monotonic(), 1e-3)
        open_socket = socket.create_connection((host, port), left)
        if self._tls is not None:
            open_socket = self._tls.wrap_socket(
                open_socket, server_hostname=host, do_handshake_on_connect=False
            )
        # A socket's own limit is for each of its reads, so that a byte now and then would do.
        timer = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [open_socket])
        timer.daemon = True
        timer.start()
        connection = http.client.HTTPConnection(str(host), port)
        connection.sock = open_socket
        try:
            with hangup.reaches(open_socket):
                if isinstance(open_socket, ssl.SSLSocket):
                    open_socket.do_handshake()
                path = self._parts.path.rstrip("/") + path
                # Compressed, an answer of a few bytes could have any size.
                headers = {"Accept-Encoding": "identity", "Connection": "close"}
                if body is None:
                    connection.request("GET", path, headers=headers)
                else:
                    headers["Content-Type"] = "application/json"
                    connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
                content = response.read(largest + 1)
                # As much as it announced: `read` of a size does not check.
                if response.length and len(content) <= largest:
                    raise http.client.IncompleteRead(b"", response.length)
                # An answer without a length ends where the connection does, for whatever reason.
                if hangup.happened or time.monotonic() >= deadline:
                    raise TimeoutError
                return response.status, content
        finally:
            timer.cancel()
            connection.close()


def _parsed(url: str) -> SplitResult | None:
    """The parts of a URL; None: it is none of a server."""
    try:
        parts = urlsplit(url)
        whole = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    plain = re.fullmatch(r"[!-~]+", url) and not parts.query and not parts.fragment
    alone = "@" not in url and "?" not in url and "#" not in url
    return parts if whole and plain and alone and parts.scheme in ("http", "https") else None


def _shut(open_socket: socket.socket) -> None:
    """Make every read and write of a socket end, from another thread."""
    # The server may have closed it. TLS's own `shutdown` would take its state from the reader.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


def _fault(error: Exception) -> str:
    """What broke a connection; exceptions of HTTP quote what came, unless it was too little."""
    if isinstance(error, http.client.HTTPException) and not isinstance(
        error, http.client.RemoteDisconnected | http.client.IncompleteRead
    ):
        return "the answer is no HTTP"
    return str(error)


def _reason(content: bytes) -> str:
    """What an answer states as the reason of its status, behind a colon; "" where it has none."""
    try:
        stated = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    # vLLM's {"error": {"message": …}}, and {"detail": …} of the framework below it.
    for name in ("error", "message", "detail"):
        if isinstance(stated, dict):
            stated = stated.get(name, stated)
    return f": {one_line(stated)[:_LONGEST_REASON]}" if isinstance(stated, str) else ""

"""Asks a server for its metrics."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from paged_kv.top.scrape import Scrape, parse
from paged_kv.top.words import plain

TIMEOUT = 5.0  # seconds without a byte
MOST = 32 << 20  # bytes; a server of ours sends some 100 KB
PATH = "/metrics"


class Unanswered(Exception):
    """There is no answer, or none that can be read; says why."""


class Server:
    """A server's metrics.

    Args:
        url: of the server, or of its metrics.
        headers: NAME: VALUE, sent with every request.

    Attributes:
        url: of the metrics.

    Raises:
        ValueError: names what cannot be used, and says what can.
    """

    def __init__(self, url: str, headers: Sequence[str] = ()) -> None:
        self.url = _metrics_url(url)
        self._headers = dict(map(_header, headers))
        # Not to where an answer sends us: the headers are for this server.
        self._opener = urllib.request.build_opener(_Stays)

    def scrape(self) -> Scrape:
        """Its metrics now. Raises Unanswered."""
        request = urllib.request.Request(self.url, headers=self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                text = response.read(MOST + 1)
        except urllib.error.HTTPError as error:
            raise Unanswered(f"{self.url} answers {error.code} {plain(error.reason)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unanswered(f"{self.url} does not answer: {plain(str(reason))}") from None
        if len(text) > MOST:
            raise Unanswered(f"{self.url} answers more than {MOST >> 20} MiB")
        try:
            return parse(text.decode(errors="replace"), time.monotonic())
        except (ValueError, OverflowError):
            raise Unanswered(f"{self.url} answers something else than metrics") from None


class _Stays(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Nowhere: the answer is an error, then."""


def _metrics_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"URL must be a server's, such as http://127.0.0.1:8000, not {url!r}")
    if parts.username is not None:
        raise ValueError("URL must hold no user name: use --header 'Authorization: Basic ...'")
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path if path.endswith(PATH) else path + PATH))


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip() and text.isascii() and text.isprintable()):
        raise ValueError(f"--header must be 'NAME: VALUE', in printable ASCII, not {text!r}")
    return name.strip(), value.strip()

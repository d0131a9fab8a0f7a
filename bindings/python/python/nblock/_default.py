"""The default client, for locks that were made without a client."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from ._errors import Error
from ._nblock import Client
from ._seconds import Seconds

_options: dict[str, Any] = {}
_client: Client | None = None
# Every default client so far: its locks may still be in use.
_opened: list[Client] = []


def configure(
    url: str | None = None,
    expire: Seconds | None = 60,
    timeout: Seconds | None = 10,
    *,
    app: str | None = None,
    op_timeout: Seconds | None = None,
    connect_timeout: Seconds | None = None,
) -> None:
    """Set the arguments of the default client; see Client for their meaning.

    The default client is opened when a lock that was made without a client is first used. A lock that was used
    before keeps the client that it was used with. Does not wait. Raises TypeError or ValueError for wrong
    arguments.
    """
    global _options, _client
    # Wrong types and values are reported here; only the store itself is asked later.
    asked: dict[str, Any] = {
        "url": url,
        "expire": expire,
        "timeout": timeout,
        "app": app,
        "op_timeout": op_timeout,
        "connect_timeout": connect_timeout,
    }
    Client._check(**asked)
    _options = asked
    _client = None


def options() -> dict[str, Any]:
    """The arguments that the default client is opened with."""
    return _options


def present() -> bool:
    """Whether the default client is open."""
    return _client is not None


def client() -> Client:
    """The default client. Opens it if necessary: that waits for the store's reply."""
    # No mutex: a thread that holds one while the process forks would leave it locked in the child.
    return _client or adopt(_options, Client(**_options))


def adopt(asked: dict[str, Any], opened: Client) -> Client:
    """Make a client the default one, unless another thread or task was first."""
    global _client
    if _client is None or asked is not _options:
        if asked is _options:
            _client = opened
        _opened.append(opened)
        return opened
    opened.close(0)
    return _client


def program_name() -> str:
    """The name of the program, to be shown when locks are listed."""
    script = sys.argv[0] if sys.argv else ""
    name = os.path.basename(script)
    if name == "__main__.py":
        # python -m package
        name = os.path.basename(os.path.dirname(script))
    if name in ("", "-c", "-m"):
        name = "python"
    # At most 255 bytes, however long the name of the file is.
    return name.encode("utf-8", "replace").replace(b"\0", b"?")[:255].decode("utf-8", "ignore")


@atexit.register
def _close() -> None:
    """Release the holds that are renewed; plain leases run out."""
    for opened in _opened:
        try:
            opened.close()
        except Error as error:
            print(f"nblock: at exit: {error}", file=sys.stderr)

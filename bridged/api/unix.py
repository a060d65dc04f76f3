"""A Unix socket in the place of one that a dead daemon left, never of one that answers."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from bridged.errors import ConfigError

BACKLOG = 512  # Connections that the kernel holds until we take them: a burst of a thousand is taken within this.


def bind_unix(path: Path, mode: int) -> socket.socket:
    """Bound under a temporary name, given its mode, then renamed: it never answers to the wrong people, and never not."""
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                pass  # Left by a daemon that died.
            except OSError as error:
                raise ConfigError(f"{path} is in the way: {error.strerror or error}", path=str(path)) from error
            else:
                raise ConfigError(f"another daemon answers on {path}", path=str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        sock.bind(str(temporary))
        temporary.chmod(mode)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"listening on {path} failed: {error.strerror or error}", path=str(path)) from error
    return sock

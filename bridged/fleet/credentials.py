"""A ``.creds`` file of NATS: a JWT that says who we are, and the seed of the key that proves it. Read anew for each connection.

The seed is the base32 of two bytes with what it is for, 32 bytes of Ed25519, and a CRC-16. nats-py leaves this to the package
nkeys, which needs a second library of curves beside the one that signatures of images need.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from bridged.errors import ConfigError

_JWT = re.compile(rb"-----BEGIN NATS USER JWT-----\s+([\w.-]+)\s+-+END")
_SEED = re.compile(rb"-----BEGIN USER NKEY SEED-----\s+([A-Z2-7]+)\s+-+END")
_USER_SEED = bytes((0x90 | 160 >> 5, (160 & 31) << 3))  # The types seed and user, five bits each: it begins with SU.

Sign = Callable[[str], bytes]


def read(path: Path) -> tuple[bytes, Sign]:
    """The JWT, and what signs the broker's challenge. Raises ``ConfigError``, which never has anything of the seed in it."""
    if find_spec("cryptography") is None:
        raise ConfigError("fleet.credentials needs the package cryptography: pip install 'bridged[sign]'")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"reading fleet.credentials {path}: {error.strerror or error}") from error
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise ConfigError(
            f"fleet.credentials {path} has no {'seed of a user' if jwt else 'JWT of a user'}: a .creds file has both"
        )
    return jwt[1], _signer(_raw(seed[1], path))


def _raw(seed: bytes, path: Path) -> bytes:
    try:
        raw = base64.b32decode(seed + b"=" * (-len(seed) % 8))
    except binascii.Error as error:
        raise ConfigError(f"fleet.credentials {path}: the seed is damaged") from error
    if len(raw) != 36 or binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise ConfigError(f"fleet.credentials {path}: the seed is damaged")
    if raw[:2] != _USER_SEED:
        raise ConfigError(f"fleet.credentials {path}: the seed is not that of a user")
    return raw[2:34]


def _signer(raw: bytes) -> Sign:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(raw)
    return lambda nonce: base64.b64encode(key.sign(nonce.encode()))

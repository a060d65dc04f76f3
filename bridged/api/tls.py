"""TLS for every listener: one context, made from ``[tls]``, and the one rule of which listener must have it.

``Tls`` holds the context; ``reload`` reads certificate, key and authorities again for the connections to come (a renewed
certificate needs no restart, and an authority that was taken out is believed no longer). ``transport`` answers, for an address
of the configuration, what a listener there must speak (P7): plain text on loopback, TLS beyond it, unless the configuration
says ``plaintext:`` or ``tls:`` in front of it; ``by_certificate`` is the stricter rule for consoles.
Document: docs/security.md.

When the certificates that a gateway shows end is an ``Ending`` each: for people in the log, for machines in the metrics.

TLS 1.2 at least; with ``tls.client_ca`` certificates of clients are checked against it, and ``api.auth`` gives their names
rights. Secrets are named, never written, in the configuration: a file, or ``credential:NAME`` of systemd.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridged import config
from bridged.api.auth import is_loopback
from bridged.config.values import CERTIFICATES_ONLY, Listen
from bridged.errors import ConfigError, NotAllowed

EXPIRES_SOON_S = 21 * 86400.0  # Three weeks: somebody is on holiday, and who renews by a machine does it a month before.
HANDSHAKE_S = 10.0  # From the first byte to the end of the handshake; a phone far away needs two seconds.


def secret_file(reference: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The file that holds a secret: a path, or ``credential:NAME`` (systemd's ``LoadCredential=``). Raises ``ConfigError``."""
    name = reference.removeprefix("credential:")
    if name == reference:
        return Path(reference)
    folder = environment.get("CREDENTIALS_DIRECTORY", "")
    if not folder:
        raise ConfigError(f"{reference}: systemd gave no credentials ($CREDENTIALS_DIRECTORY); say LoadCredential={name}:FILE")
    return Path(folder, name)


@dataclass(frozen=True, slots=True)
class Ending:
    """When the certificate that a setting names ends, in UTC seconds: ``tls.certificate``, which clients see, or
    ``fleet.certificate``, which the broker sees."""

    setting: str
    file: str
    expires: float

    def warning(self, now: float) -> str:
        """A sentence for people where it ends soon, or has ended: from then on nobody comes in, or we do not."""
        left_s = self.expires - now
        if left_s > EXPIRES_SOON_S:
            return ""
        refuses, then = "clients refuse", "renew it, then `systemctl reload bridged`"
        if self.setting != "tls.certificate":
            refuses, then = "the broker refuses", "renew it; the next connection uses the new one"
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires))
        days = round(left_s / 86400)
        says = f"expires in {days} day{'' if days == 1 else 's'}" if left_s > 0 else f"has expired, and {refuses} it"
        return f"{self.setting} {self.file} {says} ({when}): {then}"


def ending(setting: str, reference: str, environment: Mapping[str, str] = os.environ) -> Ending:
    """Of the first certificate in the file, which is our own one. Raises ``ConfigError``, ``OSError`` or ``ValueError``."""
    # The only decoder of certificates in the standard library; the module `ssl` tests itself with it.
    decoded = ssl._ssl._test_decode_cert(secret_file(reference, environment))  # type: ignore[attr-defined]
    return Ending(setting, reference, float(ssl.cert_time_to_seconds(decoded["notAfter"])))


class _Newest(ssl.SSLContext):
    """What servers get once and for all: each handshake is done with the context that was read last.

    Loading into a context that is in use would only ever add authorities, and leave half a change where the second file is
    wrong.
    """

    current: ssl.SSLContext

    def wrap_bio(self, *args: Any, **more: Any) -> ssl.SSLObject:
        return self.current.wrap_bio(*args, **more)


class Tls:
    """Raises ``ConfigError`` where certificate or key cannot be used."""

    def __init__(self, settings: config.Tls, environment: Mapping[str, str] = os.environ) -> None:
        self._settings, self._environment = settings, environment
        self._newest = _Newest(ssl.PROTOCOL_TLS_SERVER)
        self.reload()

    @property
    def context(self) -> ssl.SSLContext:
        return self._newest

    @property
    def identifies(self) -> bool:
        """Whether clients can show who they are by a certificate."""
        return bool(self._settings.client_ca)

    def reload(self) -> None:
        """Read the files again; where one is wrong, what was read before stays in force."""
        settings = self._settings
        certificate, key = (secret_file(text, self._environment) for text in (settings.certificate, settings.key))
        what = f"reading tls.certificate {certificate} and tls.key {key}"
        try:
            if stat.S_IMODE(key.stat().st_mode) & stat.S_IRWXO:
                raise ConfigError(f"{what}: everybody may read the key; say chmod o= {key}")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
            context.load_cert_chain(certificate, key, password=_no_password)
            if settings.client_ca:
                what = f"reading tls.client_ca {settings.client_ca}"
                context.load_verify_locations(secret_file(settings.client_ca, self._environment))
                context.verify_mode = ssl.CERT_REQUIRED if settings.client_required else ssl.CERT_OPTIONAL
                # In a resumed session nobody looks whether the certificate has expired: without tickets OpenSSL keeps those of
                # TLS 1.2 itself, for 300 s, and those of TLS 1.3 not at all.
                context.options |= ssl.OP_NO_TICKET
                context.num_tickets = 0
            what = f"reading tls.certificate {certificate}"
            ends = ending("tls.certificate", settings.certificate, self._environment)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"{what}: {getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error}"
            ) from error
        self._newest.current, self.ending = context, ends


def _no_password() -> str:
    raise ValueError("the key is encrypted; nobody is there to type its password, so give it as a systemd credential instead")


def transport(listen: Listen, tls: Tls | None, what: str) -> ssl.SSLContext | None:
    """What a listener at this address speaks: a TLS context, or ``None`` for plain text. Raises ``NotAllowed`` (P7)."""
    if listen.scheme == "plaintext" or (not listen.scheme and is_loopback(listen.host)):
        return None
    if tls is None:
        raise NotAllowed(
            f"{what} may not listen on {listen.host or 'every address'} without TLS: beyond loopback tokens could be read on "
            f"their way. Set tls.certificate and tls.key, or say plaintext:{listen} where everybody on the network may read "
            "them; or leave it on 127.0.0.1 and use `ssh -L`",
            host=listen.host,
        )
    return tls.context


def by_certificate(listen: Listen, tls: Tls | None, what: str) -> ssl.SSLContext | None:
    """As ``transport``, for a wire on which nobody can show a token: beyond loopback it takes TLS and clients' certificates."""
    if not is_loopback(listen.host) and (listen.scheme == "plaintext" or tls is None or not tls.identifies):
        raise NotAllowed(f"{what} may not listen on {listen.host or 'every address'}: {CERTIFICATES_ONLY}", host=listen.host)
    return transport(listen, tls, what)

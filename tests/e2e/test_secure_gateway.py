"""The real daemon with TLS, tokens and signed images, the command line from outside, and a search for secrets written down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bridged import chips
from tests.e2e.gateway import Gateway
from tests.jobs.test_policy import Signer
from tests.support import free_port
from tests.target.bench import make_image
from tests.test_client import Certificates


def test_a_remote_client_flashes_a_signed_image_and_no_secret_is_written(tmp_path: Path) -> None:
    certificate, key = Certificates(tmp_path).make("gw.example")
    signer = Signer.make(tmp_path)
    image = make_image(chips.find("F756"), 4_000)
    app = tmp_path / "app.bin"
    app.write_bytes(image.segments[0].data)
    (tmp_path / "app.bin.minisig").write_text(signer.text(app, "version:1.4.2 chip:F756"))
    (tmp_path / "old.minisig").write_text(signer.text(app, "version:1.4.1 chip:F756"))
    port = free_port()
    extra = (
        f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n[auth]\nloopback = []\n[signing]\nkeys = ["{signer.public}"]\n'
        "[targets.f7.policy]\nsignature = true\nno_downgrade = true\n"
    )
    tokens: list[str] = []

    def bridged(where: str, *args: str, token: str = "") -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("BRIDGED_")}
        env |= {"HOME": str(tmp_path), "BRIDGED_CA": str(tmp_path / "ca.pem"), "BRIDGED_NAME": "gw.example"}
        env |= {"BRIDGED_TOKEN_FILE": token} if token else {}
        return subprocess.run(
            [sys.executable, "-m", "bridged", "-g", where, *args],
            capture_output=True,
            text=True,
            env=env,
            timeout=60,
            check=False,
        )

    remote = f"tls:127.0.0.1:{port}"
    with Gateway(tmp_path, {"f7": "F756"}, extra=extra, listen=remote) as gateway:
        here = f"unix:{tmp_path}/bridged.sock"
        made = bridged(here, "token", "add", "ci", "--scope", "flash", "--target", "f7", "--expires", "1h")
        assert made.returncode == 0, made.stderr
        tokens.append(made.stdout.strip())
        (tmp_path / "ci.token").write_text(tokens[0])
        token = str(tmp_path / "ci.token")

        assert bridged(remote, "targets").returncode == 77, "nobody"
        assert "f7" in bridged(remote, "targets", token=token).stdout
        flash = ("flash", "f7", str(app), "--addr", "0x08000000")
        unsigned = bridged(remote, *flash, token=token)
        assert unsigned.returncode == 6
        assert "takes signed images only" in unsigned.stderr
        signed = bridged(remote, *flash, "--sig", str(tmp_path / "app.bin.minisig"), "--trace", token=token)
        assert signed.returncode == 0, signed.stderr
        assert gateway.holds("f7", image)
        older = bridged(remote, *flash, "--sig", str(tmp_path / "old.minisig"), token=token)
        assert older.returncode == 6
        assert "rule version: version 1.4.1 is older than 1.4.2" in older.stderr

        jobs = bridged(here, "jobs").stdout
        found = re.search(r"^(\w+) +flash +f7 +succeeded", jobs, re.MULTILINE)
        assert found, jobs
        status = bridged(here, "status", found[1]).stdout
        assert re.search(r"^principal +token-ci$", status, re.MULTILINE)
        assert re.search(r"^source +127\.0\.0\.1:\d+$", status, re.MULTILINE)
        audit = bridged(here, "audit").stdout
        assert re.search(rf"token-ci +127\.0\.0\.1:\d+ +flash +f7 +{found[1]} +queued", audit)
        assert re.search(r"token-ci +127\.0\.0\.1:\d+ +flash +f7 +SIGNATURE", audit)

        assert bridged(here, "token", "revoke", "ci").returncode == 0
        assert bridged(remote, "targets", token=token).returncode == 77, "at once"
        gateway.stop()

    log = (tmp_path / "daemon.log").read_text()
    assert "audit: token-ci from 127.0.0.1:" in log
    written = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert any(path.parent.name == "traces" for path in written)
    private = key.read_text().splitlines()[1]
    for path in (*written, tmp_path / "daemon.log"):
        data = path.read_bytes()
        assert tokens[0].encode() not in data, path
        assert tokens[0][8:28].encode() not in data, path
        assert private.encode() not in data, path

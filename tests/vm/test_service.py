"""The unit, as systemd sees it, in a container: readiness, sockets, secrets, the sandbox, the journal."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

import pytest

from bridged import chips
from bridged.logs import Notice
from tests.support import missing
from tests.target.bench import make_image
from tests.vm.bench import raw
from tests.vm.container import Container
from tests.vm.inside import configure, flash, say, status, wait_for
from tests.vm.record import Tried, record

F407 = chips.find("F407")


def image(size_bytes: int, seed: int) -> bytes:
    return raw(make_image(F407, size_bytes, seed=seed))


def show(inside: Container, name: str, unit: str = "bridged") -> str:
    return inside.run(f"systemctl show -P {name} {unit}").strip()


def http(path: str) -> str:
    """A line of shell that asks for it."""
    request = f"GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n"
    return f"exec 3<>/dev/tcp/127.0.0.1/7101; printf '{request}' >&3; cat <&3"


def entries(inside: Container, *matches: str) -> list[dict[str, str]]:
    text = inside.run(f"journalctl --sync; journalctl -b -o json --no-pager {' '.join(matches)}")
    return [json.loads(line) for line in text.splitlines()]


# --- notify and the watchdog ------------------------------------------------------------------------------------------


def test_systemd_knows_that_it_is_ready_and_what_it_does(installed: Container) -> None:
    assert show(installed, "Type") == "notify"
    assert show(installed, "StatusText") == "1 target"
    job = flash(installed, image(20 * 1024, 1), "status")
    wait_for(installed, job, phase="write")
    assert show(installed, "StatusText") == f"1 target, job {job}"
    assert wait_for(installed, job, state="succeeded|failed")["state"] == "succeeded"
    installed.wait_for("the job is out of the status", "test \"$(systemctl show -P StatusText bridged)\" = '1 target'")


def test_a_reload_is_told_and_a_bad_configuration_leaves_the_old_one(installed: Container) -> None:
    before = show(installed, "MainPID")
    good = installed.read("/etc/bridged/bridged.toml")
    try:
        installed.write("/etc/bridged/bridged.toml", good.replace(b"F407", b"F999"))
        installed.run("systemctl reload bridged")
        installed.wait_for("the mistake is told", f"journalctl -b MESSAGE_ID={Notice.CONFIG_REJECTED.message_id} | grep F999")
        assert "chip=F407" in say(installed, "TARGETS")
    finally:
        installed.write("/etc/bridged/bridged.toml", good)
    installed.run("systemctl reload bridged")
    installed.wait_for("the reload is over", "test $(systemctl is-active bridged) = active")
    assert show(installed, "MainPID") == before


def test_a_configuration_with_mistakes_is_not_tried_again_and_again(installed: Container) -> None:
    good = installed.read("/etc/bridged/bridged.toml")
    try:
        installed.write("/etc/bridged/bridged.toml", good.replace(b"F407", b"F999"))
        assert installed.try_("systemctl restart bridged").status != 0
        assert (show(installed, "ActiveState"), show(installed, "ExecMainStatus")) == ("failed", "78")
        assert show(installed, "NRestarts") == "0"
    finally:
        installed.write("/etc/bridged/bridged.toml", good)
        installed.run("systemctl reset-failed bridged")
        configure(installed)


def test_the_watchdog_is_fed_while_it_works_and_bites_in_the_middle_of_a_flash_which_goes_on(installed: Container) -> None:
    installed.write("/etc/systemd/system/bridged.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
    data = image(30 * 1024, 20)
    try:
        installed.run("systemctl daemon-reload && systemctl restart bridged && sleep 4")
        assert show(installed, "NRestarts") == "0", "fed"
        wait_idle(installed)
        job = flash(installed, data, "watched")
        wait_for(installed, job, phase="write")
        installed.run("kill -STOP $(systemctl show -P MainPID bridged)")
        installed.wait_for("it is started again", "test $(systemctl show -P NRestarts bridged) = 1")
        assert "Watchdog timeout (limit 2s)" in installed.run("journalctl -b -u bridged --no-pager")
        installed.wait_for("and ready", "test $(systemctl is-active bridged) = active")
        end = wait_for(installed, job, state="succeeded|failed")
        # The session lost its daemon, ended in order, and left idle lines: the application ran before the second attempt.
        assert (end["state"], end["attempts"]) == ("succeeded", "2"), end
        record(Tried("daemon hangs during write, watchdog (in a container)", end["state"]))
    finally:
        installed.run("rm /etc/systemd/system/bridged.service.d/watchdog.conf; systemctl daemon-reload")
        configure(installed)


def test_drain_lets_the_job_finish_and_then_stops(installed: Container) -> None:
    job = flash(installed, image(16 * 1024, 21), "drained")
    wait_for(installed, job, phase="write")
    answer = say(installed, "FLASH sim drained addr=0x08000000 id=after-the-drain")
    assert "250 " in answer, answer
    installed.run("bridged -g unix:/run/bridged/bridged.sock drain")
    installed.wait_for("the daemon ends", "test $(systemctl is-active bridged) = inactive")
    assert show(installed, "Result") == "success"
    installed.run("systemctl start bridged")
    end = status(installed, job)
    assert (end["state"], end["attempts"]) == ("succeeded", "1"), end
    waiting = re.findall(r"\bjob=(\S+)", answer)[0]
    assert wait_for(installed, waiting, state="succeeded|failed")["state"] == "succeeded"
    record(Tried("bridged drain during write (in a container)", "succeeded, then the daemon ended"))


def wait_idle(inside: Container) -> None:
    inside.wait_for("the target is idle", "printf 'TARGETS\\nQUIT\\n' | nc -N 127.0.0.1 7100 | grep -q 'sim state=idle'")


# --- sockets ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sockets(installed: Container) -> Iterator[Container]:
    """systemd holds every socket; the daemon is not running."""
    units = "bridged.socket bridged-http.socket bridged-console@sim.socket"
    installed.run(f"systemctl stop bridged && systemctl start {units}")
    yield installed
    installed.run(f"systemctl stop {units} bridged && systemctl start bridged")


def test_a_client_starts_the_daemon_by_connecting(sockets: Container) -> None:
    assert show(sockets, "ActiveState") == "inactive"
    assert "250 PONG" in say(sockets, "PING")
    sockets.wait_for("ready", "test $(systemctl is-active bridged) = active")
    text = sockets.run("journalctl -b -u bridged --no-pager -n 30")
    for where in ("127.0.0.1:7100", "/run/bridged/bridged.sock", "http 127.0.0.1:7101", "/run/bridged/console-sim.sock"):
        assert re.search(rf"{re.escape(where)} \([^)]*passed\)", text), f"{where} in {text}"
    assert "HTTP/1.1 200" in sockets.run(http("/v1/targets"))


def test_nobody_is_refused_while_it_restarts(sockets: Container) -> None:
    say(sockets, "PING")
    # A restart, and connections all the while: each is answered, some a little later. Who was just heard by the daemon that
    # ends is told so (421), and none is refused or left without a word.
    said = sockets.run(
        "systemctl --no-block restart bridged; "
        "for i in $(seq 20); do printf 'PING\\nQUIT\\n' | nc -N 127.0.0.1 7100 | grep -oE 'PONG|^421 ' || exit 1; done"
    ).split()
    assert len(said) == 20
    assert said.count("421") <= 2, said


def test_the_console_of_a_target_waits_on_its_socket(sockets: Container) -> None:
    """The application echoes nothing by itself; what it prints after a reset comes out of the console."""
    say(sockets, "PING")
    wait_idle(sockets)
    job = flash(sockets, image(4096, 3), "console")
    assert wait_for(sockets, job, state="succeeded|failed")["state"] == "succeeded"
    sockets.run(
        "systemd-run --quiet --collect --unit=listener sh -c 'exec nc -U /run/bridged/console-sim.sock > /root/console.out'"
    )
    out = sockets.run(
        "sleep 0.5; "
        "printf 'RESET sim wait=1\\nQUIT\\n' | nc -N 127.0.0.1 7100 > /dev/null; "
        "for i in $(seq 50); do grep -q 'bench application' /root/console.out && break; sleep 0.2; done; cat /root/console.out"
    )
    assert "bench application" in out


# --- secrets and the sandbox --------------------------------------------------------------------------------------------


def test_secrets_come_from_systemd_and_nobody_else_sees_them(installed: Container) -> None:
    installed.run("umask 077; echo s3cret > /etc/bridged/credentials/token")
    try:
        installed.run("systemctl restart bridged")
        folder = installed.run(
            "tr '\\0' '\\n' < /proc/$(systemctl show -P MainPID bridged)/environ | sed -n 's/^CREDENTIALS_DIRECTORY=//p'"
        ).strip()
        assert installed.run(f"cat {folder}/bridged_token") == "s3cret\n"
        as_daemon = "setpriv --reuid=bridged --regid=bridged --clear-groups"
        assert installed.try_(f"{as_daemon} cat /etc/bridged/credentials/token").status != 0, "only systemd reads the file"
        assert installed.try_(f"setpriv --reuid=nobody --regid=nogroup --clear-groups cat {folder}/bridged_token").status != 0
    finally:
        installed.run("rm /etc/bridged/credentials/token")


def test_the_private_key_of_tls_as_a_secret(installed: Container) -> None:
    key, certificate = self_signed()
    installed.write("/etc/bridged/credentials/tls.key", key, 0o600)
    installed.write("/etc/bridged/credentials/tls.pem", certificate, 0o600)
    try:
        configure(
            installed,
            '[tls]\ncertificate = "credential:bridged_tls.pem"\nkey = "credential:bridged_tls.key"\n'
            '[api]\nlisten = "127.0.0.1:7100 tls:127.0.0.1:7443"\n',
        )
        said = installed.run(
            '/opt/bridged/bin/python3 -c "import socket, ssl; c = ssl.create_default_context(); c.check_hostname = False; '
            "c.verify_mode = ssl.CERT_NONE; s = c.wrap_socket(socket.create_connection(('127.0.0.1', 7443))); "
            'print(s.version(), s.recv(100))"'
        )
        assert "TLSv1.3" in said
        assert "220 bridged" in said
    finally:
        installed.run("rm -f /etc/bridged/credentials/tls.*")
        configure(installed)


def self_signed() -> tuple[bytes, bytes]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    return (
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    )


def test_the_running_unit_is_locked_down(installed: Container) -> None:
    text = installed.run("systemd-analyze security --no-pager bridged.service")
    found = re.search(r"Overall exposure level for bridged.service: (\d+\.\d+)", text)
    assert found, text
    assert float(found[1]) <= 2.0, text


def test_the_daemon_can_write_its_own_state_only(installed: Container) -> None:
    pid = show(installed, "MainPID")
    inside = f"nsenter --target {pid} --mount --root -- setpriv --reuid=bridged --regid=bridged --clear-groups"
    assert installed.try_(f"{inside} touch /var/lib/bridged/x").status == 0
    installed.run("rm /var/lib/bridged/x")
    for place in ("/etc/bridged", "/opt/bridged", "/var/lib", "/usr"):
        answer = installed.try_(f"nsenter --target {pid} --mount --root -- touch {place}/x")
        assert "Read-only file system" in answer.err, (place, answer)


# --- the journal --------------------------------------------------------------------------------------------------------


def test_the_journal_can_be_asked_by_job_target_and_kind(installed: Container) -> None:
    job = flash(installed, image(4096, 4), "journal")
    assert wait_for(installed, job, state="succeeded|failed")["state"] == "succeeded"
    asked, found = entries(installed, f"BRIDGED_JOB={job}")
    assert (asked["BRIDGED_AUDIT"], asked["BRIDGED_WHO"], asked["BRIDGED_RESULT"]) == ("flash", "local", "queued")
    assert found["MESSAGE_ID"] == Notice.JOB_ENDED.message_id
    assert (found["BRIDGED_TARGET"], found["BRIDGED_STATE"], found["PRIORITY"]) == ("sim", "succeeded", "6")
    assert found["_SYSTEMD_UNIT"] == "bridged.service"
    assert found["SYSLOG_IDENTIFIER"] == "bridged"
    assert entries(installed, f"MESSAGE_ID={Notice.STARTED.message_id}")


def test_a_failure_is_an_error_with_its_code(installed: Container) -> None:
    answer = say(installed, "VERIFY sim journal addr=0x08000000 wait=1")
    assert "state=succeeded" in answer, answer
    installed.run("systemctl stop sim")
    try:
        installed.wait_for("the target is gone", "printf 'TARGETS\\nQUIT\\n' | nc -N 127.0.0.1 7100 | grep -q 'state=absent'")
        (*_, found) = entries(installed, "BRIDGED_TARGET=sim", f"MESSAGE_ID={Notice.TARGET_ABSENT.message_id}")
        assert found["PRIORITY"] == "4"
    finally:
        installed.run("systemctl start sim")
        configure(installed)


def test_the_catalogue_explains_messages(installed: Container) -> None:
    text = installed.run(f"journalctl -b -x --no-pager MESSAGE_ID={Notice.STARTED.message_id}")
    assert Notice.STARTED.subject in text
    assert "no other target was reset" in text
    assert installed.run("journalctl --list-catalog --no-pager").count(" bridged:") == len(Notice)


def test_no_field_is_lost_when_the_journal_is_restarted(installed: Container) -> None:
    installed.run("systemctl restart systemd-journald")
    job = flash(installed, image(4096, 5), "restarted")
    assert wait_for(installed, job, state="succeeded|failed")["state"] == "succeeded"
    said = entries(installed, f"BRIDGED_JOB={job}")
    assert [entry.get("BRIDGED_STATE") or entry["BRIDGED_RESULT"] for entry in said] == ["queued", "succeeded"]


# --- users, folders, devices ----------------------------------------------------------------------------------------


def test_user_groups_and_folders(installed: Container) -> None:
    assert "dialout" in installed.run("systemctl show -P SupplementaryGroups bridged")
    assert installed.run("getent group gpio")
    assert installed.run("stat -c '%a %U' /etc/bridged/credentials /var/lib/bridged").splitlines() == [
        "700 root",
        "700 bridged",
    ]
    assert installed.run("getent passwd bridged").rstrip().endswith("/nologin")
    pid = show(installed, "MainPID")
    assert installed.run(f"ps -o user= -p {pid}").strip() == "bridged"


# --- disks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(installed: Container) -> Iterator[Container]:
    """The state on a partition of its own, of 40 MiB; new and empty."""
    installed.run(
        "systemctl stop bridged && mount -t tmpfs -o size=40m,mode=700,uid=$(id -u bridged),gid=$(id -g bridged) tmpfs"
        " /var/lib/bridged && systemctl start bridged"
    )
    wait_idle(installed)
    yield installed
    installed.run(
        "mount -o remount,rw /; systemctl stop bridged sim; umount /var/lib/bridged; umount -q /var/lib/sim;"
        " systemctl start sim; systemctl reset-failed bridged; true"
    )
    configure(installed)


def test_a_full_disk_stops_what_erases_and_nothing_that_runs(small_disk: Container) -> None:
    fill = "head -c 60M /dev/zero > /var/lib/bridged/ballast"
    job = flash(small_disk, image(20 * 1024, 30), "full")
    wait_for(small_disk, job, phase="write")
    small_disk.try_(fill)
    # Its end may have to wait for space; it is not lost, and meanwhile nothing else is begun.
    answer = say(small_disk, "FLASH sim full addr=0x08000000")
    assert "452 STORAGE_FULL" in answer, answer
    small_disk.run("rm /var/lib/bridged/ballast")
    end = wait_for(small_disk, job, state="succeeded|failed")
    assert end["state"] == "succeeded" or end["error"] == "STORAGE_FULL", end
    again = say(small_disk, "FLASH sim full addr=0x08000000 mode=full wait=1")
    assert "state=succeeded" in again, again
    record(Tried("disk full during write (in a container)", end["state"], end.get("error", "")))


@pytest.fixture
def failing_disk(installed: Container) -> Iterator[Container]:
    """The state on an ext4 of its own."""
    if not installed.has_disk:
        missing("loop devices", "a kernel that has them (modprobe loop)")
    mount = "mount /dev/disk /var/lib/bridged && chown bridged: /var/lib/bridged && chmod 700 /var/lib/bridged"
    installed.run(f"systemctl stop bridged && {mount} && systemctl start bridged")
    wait_idle(installed)
    yield installed
    installed.run("systemctl stop bridged; umount -q /var/lib/bridged; systemctl reset-failed bridged; true")
    configure(installed)


FAIL = "mount -o remount,abort /var/lib/bridged"  # What ext4 does by itself after an error of the medium.
REPAIR = "umount /var/lib/bridged && mount /dev/disk /var/lib/bridged"


def test_a_disk_that_turns_read_only_in_the_middle_of_a_flash(failing_disk: Container) -> None:
    """What runs goes on, nothing new is begun, nobody is told of an end that is not on disk, and nothing is lost."""
    inside = failing_disk
    data = image(20 * 1024, 32)
    job = flash(inside, data, "failing")
    wait_for(inside, job, phase="write")
    inside.run(FAIL)
    assert "Read-only" in inside.try_("touch /var/lib/bridged/x").err
    told = wait_for(inside, job, reason="STORAGE_FAILED")
    assert told["state"] == "running", told
    for request in ("FLASH sim failing addr=0x08000000", "ID sim"):
        answer = say(inside, request)
        assert re.search("^451 STORAGE_FAILED .*disk I/O error", answer, re.MULTILINE), answer
    answer = say(inside, f"PUT 4 {hashlib.sha256(b'abcd').hexdigest()} name=more", b"abcd")
    assert "451 STORAGE_FAILED" in answer, answer
    assert "HTTP/1.1 503" in inside.run(http("/readyz"))
    # Its log does not fill up with it either.
    lines = inside.run("journalctl --sync; journalctl -b -u bridged --no-pager -o cat -n 50").splitlines()
    assert sum("cannot be written" in line for line in lines) == 1, lines
    inside.run("systemctl stop bridged")
    assert show(inside, "Result") == "success"
    inside.run(f"{REPAIR} && systemctl start bridged")
    end = wait_for(inside, job, state="succeeded|failed")
    assert (end["state"], end["attempts"]) == ("succeeded", "2"), end
    inside.run("systemctl stop bridged sim")
    assert inside.read("/var/lib/sim/flash")[: len(data)] == data
    inside.run("systemctl start sim")
    record(Tried("disk turns read-only during write, then is repaired (in a container)", end["state"]))


def test_a_target_comes_back_although_nothing_can_be_written(failing_disk: Container) -> None:
    """Both processes die in the middle and no daemon comes up again: ExecStopPost= reads the journal all the same."""
    inside = failing_disk
    job = flash(inside, image(20 * 1024, 33), "orphan")
    wait_for(inside, job, phase="write")
    count = "journalctl -b -u bridged --no-pager -o cat | grep -c 'sim is back in its application'"
    before = int(inside.try_(count).out)
    inside.run(f"{FAIL}; systemctl kill -s KILL --kill-whom=all bridged")
    inside.wait_for("it is released", f"test $({count}) -gt {before}")
    restarts = int(show(inside, "NRestarts"))
    inside.wait_for("it is tried again", f"test $(systemctl show -P NRestarts bridged) -gt {restarts + 1}")
    assert int(inside.run(count)) == before + 1, "once, and not at every try"
    inside.run(f"systemctl stop bridged; {REPAIR} && systemctl start bridged")
    end = wait_for(inside, job, state="succeeded|failed")
    assert (end["state"], end["attempts"]) == ("succeeded", "2"), end
    record(Tried("disk turns read-only and SIGKILL of both during write, then repaired (in a container)", end["state"]))


def test_everything_but_the_state_may_be_read_only(small_disk: Container) -> None:
    # As somebody who makes a root read-only does: the system's journal in memory.
    volatile = "/etc/systemd/journald.conf.d/volatile.conf"
    small_disk.write(volatile, "[Journal]\nStorage=volatile\n")
    small_disk.run(
        "systemctl stop bridged; systemctl restart systemd-journald; rm -rf /var/log/journal/*; "
        "mount -t tmpfs -o mode=777 tmpfs /var/lib/sim"  # Where the simulated target keeps its flash.
    )
    small_disk.run("mount -o remount,ro /")
    assert "Read-only" in small_disk.try_("touch /var/lib/x").err
    small_disk.run("systemctl start bridged")
    wait_idle(small_disk)
    job = flash(small_disk, image(8 * 1024, 31), "ro")
    assert wait_for(small_disk, job, state="succeeded|failed")["state"] == "succeeded"


def test_a_state_that_cannot_be_written_is_said(small_disk: Container) -> None:
    """A file system that went read-only after errors, say. The daemon does not come up, and says what it could not write."""
    small_disk.run("systemctl stop bridged; mount -o remount,ro /var/lib/bridged")
    assert small_disk.try_("systemctl start bridged").status != 0
    text = small_disk.run("journalctl -b -u bridged --no-pager -n 20")
    assert "/var/lib/bridged" in text
    assert "ead-only" in text
    small_disk.run("systemctl stop bridged; mount -o remount,rw /var/lib/bridged; systemctl reset-failed bridged")

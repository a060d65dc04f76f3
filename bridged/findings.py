"""What ``doctor`` can find: one table of codes, each with its level, when it is said and what to do.

It is one file, so that nothing is advised twice.

Two halves look. The machine half (room ``doctor``) needs no daemon and opens no port; the target half (``target/doctor.py``)
is a job, since it has to reset the target. Both say their findings in the words of this table and keep no advice of their own.
The table is the documentation: ``docs/doctor.md`` is made from it (``python -m tests.build_docs``), and tests hold it
against the codes that each half uses. A code never changes its meaning, and it always has the same level.

A finding is one sentence about one machine or target with its own names and numbers, so the sentence is written where it is
found. The remedy stands here, unless what is found allows a better one (the very line of ``config.txt``).

Levels: a *problem* keeps a job from working, a *warning* will do so one day or makes it slow, a *note* is worth knowing, and
*ok* says what was looked at and found right. This module reads nothing and knows no other module of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MACHINE = ""  # In place of the name of a target.


class Level(StrEnum):
    """Worst first; the order of the output."""

    PROBLEM = "problem"
    WARNING = "warning"
    NOTE = "note"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table. ``when``: a sentence for the documentation; ``remedy``: what a person does about it."""

    level: Level
    when: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about one target, or about the machine (``MACHINE``)."""

    level: Level
    code: str
    target: str
    text: str
    remedy: str = ""
    facts: Mapping[str, str | int | bool] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return {
            "level": self.level.value,
            "code": self.code,
            "target": self.target or None,
            "text": self.text,
            "remedy": self.remedy,
            "facts": dict(self.facts),
        }


def found(code: str, target: str, text: str, remedy: str = "", **facts: str | int | bool) -> Finding:
    """The finding of this code; ``remedy``: better than the table's, because it knows this machine."""
    entry = CATALOG[code]
    return Finding(entry.level, code, target, text, remedy or entry.remedy, facts)


# The heading of a group and its codes, in the order of the documentation. What `bridged doctor` says:
MACHINE_GROUPS: dict[str, dict[str, Entry]] = {
    "The machine": {
        "DOCTOR_MACHINE": Entry(Level.OK, "What this machine is."),
        "DOCTOR_NOT_ROOT": Entry(
            Level.NOTE,
            "The caller may not see what processes of others have open, so a port may be held all the same.",
            "Say `sudo bridged doctor` to see who holds a port.",
        ),
        "DOCTOR_UNDERVOLTAGE": Entry(
            Level.WARNING,
            "A Raspberry Pi measures less than 4.63 V at its supply: USB adapters drop out and SD cards lose data.",
            "Use the supply and the cable made for this Raspberry Pi.",
        ),
        "DOCTOR_CLOCK_WRONG": Entry(
            Level.WARNING,
            "The clock is earlier than the files of this program: records of jobs get wrong times.",
            "Set the clock (`timedatectl set-ntp true`), or fit a battery-backed one.",
        ),
        "DOCTOR_CLOCK_UNSYNCED": Entry(
            Level.NOTE,
            "The clock is not synchronised by the network; only the times in records suffer.",
            "`timedatectl set-ntp true`, where the network allows it.",
        ),
        "DOCTOR_BOOT_ID": Entry(
            Level.WARNING,
            "The kernel tells no boot id: after a crash bridged cannot know whether the machine was restarted since, and waits"
            " longer than needed before it touches a target.",
            "See that /proc/sys/kernel/random/boot_id can be read here (a container may hide it).",
        ),
    },
    "Configuration": {
        "DOCTOR_CONFIG": Entry(Level.OK, "The configuration can be used."),
        "DOCTOR_CONFIG_MISSING": Entry(
            Level.WARNING,
            "There is no configuration, so only the machine is looked at.",
            "`sudo bridged init` writes one; if it is elsewhere, name it: `bridged doctor --config FILE`.",
        ),
        "DOCTOR_CONFIG_UNREADABLE": Entry(
            Level.PROBLEM, "The configuration cannot be read.", "See that the file exists and that this user may read it."
        ),
        "DOCTOR_CONFIG_MISTAKE": Entry(
            Level.PROBLEM,
            "The configuration has a mistake; each is a finding of its own.",
            "Correct the named line; config/bridged.toml explains every setting.",
        ),
        "DOCTOR_CONFIG_DOUBTFUL": Entry(
            Level.WARNING, "Something is allowed, but probably not meant.", "See the sentence; it may be meant after all."
        ),
    },
    "The service": {
        "DOCTOR_UNIT": Entry(Level.OK, "The systemd unit is installed, enabled and runs."),
        "DOCTOR_UNIT_MISSING": Entry(
            Level.NOTE,
            "No systemd unit is installed; the daemon has to be started by hand.",
            "`sudo make install`, then `sudo systemctl enable --now bridged`.",
        ),
        "DOCTOR_UNIT_DISABLED": Entry(Level.WARNING, "The unit is not started at boot.", "`sudo systemctl enable bridged`"),
        "DOCTOR_UNIT_STOPPED": Entry(
            Level.WARNING, "The unit is installed and does not run.", "`sudo systemctl start bridged`"
        ),
        "DOCTOR_UNIT_FAILED": Entry(
            Level.PROBLEM,
            "The unit failed.",
            "`journalctl -u bridged -n 50` says why; afterwards `sudo systemctl restart bridged`.",
        ),
        "DOCTOR_UNIT_USER_MISSING": Entry(
            Level.PROBLEM, "The user of the unit does not exist, so systemd cannot start it.", "`sudo systemd-sysusers`"
        ),
        "DOCTOR_UNIT_GROUP_MISSING": Entry(
            Level.PROBLEM,
            "A group of the unit does not exist (Debian has no group gpio), so systemd cannot start it.",
            "`sudo systemd-sysusers`, or `sudo groupadd --system GROUP`",
        ),
        "DOCTOR_UNIT_DEVICE": Entry(
            Level.PROBLEM,
            "The unit's DeviceAllow= leaves out the kind of device that a target needs; opening it fails though the"
            " permissions are right.",
            "`sudo systemctl edit bridged`: [Service], DeviceAllow=KIND rw",
        ),
        "DOCTOR_UNIT_PATH": Entry(
            Level.PROBLEM,
            "The sandbox of the unit (ProtectSystem=, ProtectHome=, PrivateTmp=) hides or write-protects a configured path.",
            "Use a path under /var/lib/bridged or /run, or allow it: `sudo systemctl edit bridged`, ReadWritePaths=PATH",
        ),
        "DOCTOR_UNIT_NETWORK": Entry(
            Level.PROBLEM,
            "The unit lets nothing beyond loopback in or out: nobody reaches that listener, and that server never answers.",
            "`sudo systemctl edit bridged`: [Service], IPAddressAllow=192.168.1.0/24 (your networks, or any); restart it.",
        ),
        "DOCTOR_DAEMON": Entry(Level.OK, "The daemon answers."),
        "DOCTOR_DAEMON_STOPPED": Entry(
            Level.NOTE, "No daemon answers, and none was expected to run.", "`sudo systemctl start bridged`, or `bridged serve`"
        ),
        "DOCTOR_DAEMON_SILENT": Entry(
            Level.PROBLEM,
            "The unit runs, but nothing answers at the configured address.",
            "Was the configuration changed since? `sudo systemctl restart bridged`; `journalctl -u bridged -n 50`",
        ),
        "DOCTOR_DAEMON_VERSION": Entry(
            Level.WARNING,
            "The running daemon is of another version than this command line.",
            "`sudo systemctl restart bridged` after an upgrade; running jobs are parked and go on.",
        ),
        "DOCTOR_LISTEN_TAKEN": Entry(
            Level.PROBLEM,
            "Another program listens at the address of the line protocol.",
            "End it (`ss -ltnp` names it), or change api.listen.",
        ),
    },
    "State directory": {
        "DOCTOR_STATE_DIR": Entry(Level.OK, "The state directory can be written and has room."),
        "DOCTOR_STATE_DIR_MISSING": Entry(
            Level.NOTE, "The state directory does not exist yet.", "Nothing to do: systemd or the daemon makes it."
        ),
        "DOCTOR_STATE_DIR_FORBIDDEN": Entry(
            Level.PROBLEM,
            "Whoever runs the daemon may not write the state directory.",
            "`sudo chown -R bridged: DIRECTORY`, or another gateway.state_dir",
        ),
        "DOCTOR_STATE_DIR_READ_ONLY": Entry(
            Level.PROBLEM,
            "The file system of the state directory is read-only; a failing SD card ends so.",
            "`dmesg` says why; without a journal no job is started.",
        ),
        "DOCTOR_STATE_DIR_FULL": Entry(
            Level.PROBLEM,
            "So little room is left that no job that erases or writes is started.",
            "Make room on this file system.",
        ),
        "DOCTOR_STATE_DIR_SMALL": Entry(
            Level.WARNING,
            "There is less room than staged images may take (store.limit_mib).",
            "Make room, or lower store.limit_mib.",
        ),
    },
    "The serial port": {
        "DOCTOR_PORT": Entry(Level.OK, "What the port really is."),
        "DOCTOR_PORT_MISSING": Entry(
            Level.PROBLEM,
            "The device does not exist.",
            "Plug it in, or correct the name; the sentence lists the ports that are there.",
        ),
        "DOCTOR_PORT_NOT_SERIAL": Entry(
            Level.PROBLEM, "What is there is no serial port.", "Correct `port`; the sentence lists the ports that are there."
        ),
        "DOCTOR_PORT_EMPTY": Entry(
            Level.PROBLEM,
            "The name exists, but no UART is behind it (PCs have ttyS0 to ttyS3, fitted or not).",
            "Correct `port`; `dmesg | grep tty` shows what was found at boot.",
        ),
        "DOCTOR_PORT_PTY": Entry(
            Level.NOTE, "A pseudo terminal: a simulator, no wire; there is no parity to check.", "Right for `bridged sim`."
        ),
        "DOCTOR_PORT_SHARED": Entry(
            Level.PROBLEM,
            "Two targets use one port under different names and do not say so.",
            'Correct one of them, or declare it in both: shares = ["NAME"].',
        ),
        "DOCTOR_PORT_FORBIDDEN": Entry(
            Level.PROBLEM,
            "Whoever runs the daemon (the user of the unit, or the caller where there is none) may not open the device.",
            "`sudo usermod -aG dialout USER`, and log in anew or restart the unit.",
        ),
        "DOCTOR_CALLER_FORBIDDEN": Entry(
            Level.NOTE,
            "The caller may not open a device that the service may open.",
            "Nothing to do, unless you want to run `bridged serve` yourself.",
        ),
        "DOCTOR_PORT_HELD": Entry(
            Level.PROBLEM,
            "Another program has the port open; it steals answers, and the daemon refuses the port.",
            "End the named program.",
        ),
        "DOCTOR_GETTY": Entry(
            Level.PROBLEM,
            "A login prompt runs on the port and talks to the target.",
            "`sudo systemctl mask --now serial-getty@PORT.service`",
        ),
        "DOCTOR_GETTY_ENABLED": Entry(
            Level.WARNING,
            "A login prompt would start on the port at the next boot.",
            "`sudo systemctl mask serial-getty@PORT.service`",
        ),
        "DOCTOR_KERNEL_CONSOLE": Entry(
            Level.PROBLEM,
            "The kernel prints its messages on the port: into the target, in the middle of a job.",
            "Remove console=PORT from the kernel's command line (Raspberry Pi: /boot/firmware/cmdline.txt) and reboot.",
        ),
        "DOCTOR_MODEMMANAGER": Entry(
            Level.WARNING,
            "ModemManager runs and was not told to leave this adapter alone: it may send AT commands when it is plugged in.",
            'A rule with ENV{ID_MM_DEVICE_IGNORE}="1" in /etc/udev/rules.d/61-bridged-local.rules, or remove ModemManager.',
        ),
        "DOCTOR_BRLTTY": Entry(
            Level.WARNING,
            "brltty runs and takes adapters of this kind for Braille displays: the port vanishes or is held.",
            "`sudo apt remove brltty`, unless somebody here reads Braille.",
        ),
        "DOCTOR_MINI_UART": Entry(
            Level.PROBLEM,
            "The mini UART of a Raspberry Pi: it has no parity, its driver does not say so, and the loader refuses every"
            " command without it.",
            '/boot/firmware/config.txt: enable_uart=1 and dtoverlay=disable-bt; reboot; port = "/dev/ttyAMA0"',
        ),
        "DOCTOR_PI_BLUETOOTH": Entry(
            Level.PROBLEM,
            "The port leads to the Bluetooth chip of the Raspberry Pi and not to the header.",
            "/boot/firmware/config.txt: dtoverlay=disable-bt; reboot.",
        ),
        "DOCTOR_PI_DEBUG_PORT": Entry(
            Level.WARNING,
            "The port of a Raspberry Pi 5 that is on its debug connector and not on the header.",
            'For the header: dtparam=uart0=on in /boot/firmware/config.txt, reboot, port = "/dev/ttyAMA0".',
        ),
        "DOCTOR_FTDI_LATENCY": Entry(
            Level.WARNING,
            "An FTDI adapter waits longer than 1 ms before it passes on a short answer; there are four in each block of 256"
            " bytes. bridged asks for 1 ms when it opens the port; the rule makes it sure.",
            "Install systemd/60-bridged.rules, or: echo 1 | sudo tee /sys/class/tty/PORT/device/latency_timer",
        ),
        "DOCTOR_UNSTABLE_NAME": Entry(
            Level.WARNING,
            "The name of the port depends on the order of plugging in: one day an image goes to the wrong target.",
            "Take the name under /dev/serial/by-id, or by-path where the adapter has no serial number.",
        ),
        "DOCTOR_NO_SERIAL_NUMBER": Entry(
            Level.NOTE,
            "The adapter has no serial number: a second one of its kind gets the same name under by-id.",
            "With several of them name the socket: /dev/serial/by-path, or a rule in /etc/udev/rules.d/61-bridged-local.rules.",
        ),
    },
    "NRST, BOOT0 and power": {
        "DOCTOR_LINES": Entry(Level.OK, "The configured lines exist, and nobody else uses them."),
        "DOCTOR_LINES_NONE": Entry(
            Level.NOTE,
            "No line is configured: a person has to bring the target into its loader, and nothing is recovered without help.",
            "Wire NRST and BOOT0 (docs/wiring.md).",
        ),
        "DOCTOR_GPIOD": Entry(Level.OK, "The GPIO library can be used."),
        "DOCTOR_GPIOD_MISSING": Entry(
            Level.PROBLEM, "A target has GPIO lines, and the Python package gpiod is missing.", "pip install 'gpiod>=2.2'"
        ),
        "DOCTOR_GPIOD_OLD": Entry(
            Level.PROBLEM,
            "The Python package gpiod is of the old API (1.x, as Debian 12's python3-libgpiod), or too old.",
            "pip install 'gpiod>=2.2', in the environment that runs bridged",
        ),
        "DOCTOR_GPIO_NONE": Entry(
            Level.PROBLEM,
            "A target has GPIO lines, and the machine has no /dev/gpiochip.",
            "Is this the right machine? Otherwise the kernel lacks the driver, or a container hides the devices.",
        ),
        "DOCTOR_GPIO_FORBIDDEN": Entry(
            Level.PROBLEM,
            "Whoever runs the daemon may not open the GPIO chip.",
            "Group gpio and the rule of systemd/60-bridged.rules; `sudo usermod -aG gpio USER`",
        ),
        "DOCTOR_LINE_MISSING": Entry(
            Level.PROBLEM, "A configured line does not exist.", "Correct its name; `gpioinfo` lists all."
        ),
        "DOCTOR_LINE_BUSY": Entry(
            Level.PROBLEM,
            "Somebody else uses the line.",
            "End that program, or remove the overlay that claims it (/boot/firmware/config.txt).",
        ),
        "DOCTOR_LINE_SHARED": Entry(
            Level.PROBLEM,
            "One line under two names serves two purposes.",
            'Correct one of them; where two targets really share it, declare it in both: shares = ["NAME"].',
        ),
        "DOCTOR_LINE_ON_UART": Entry(
            Level.PROBLEM,
            "The line is TXD or RXD of the very UART that a target uses: requesting it would cut the UART off its pins.",
            "Take another pin; GPIO14 and GPIO15 (pins 8 and 10) are the UART.",
        ),
        "DOCTOR_LINE_BOX_MISSING": Entry(
            Level.PROBLEM, "The socket of the line box does not exist.", "Start the program that makes it."
        ),
        "DOCTOR_LINE_BOX_DEAD": Entry(
            Level.PROBLEM, "The socket of the line box is there, but nobody listens.", "Start the program behind it again."
        ),
        "DOCTOR_MODEM_PULSE": Entry(
            Level.NOTE,
            "Linux raises DTR and RTS when a port is opened: the target may be reset once when the daemon starts.",
            "Nothing to do where that does no harm; otherwise drive NRST by a GPIO.",
        ),
        "DOCTOR_MODEM_LINES": Entry(
            Level.WARNING,
            "This port has no DTR and RTS that could drive anything.",
            'Use GPIO lines (kind = "gpio"), or an adapter that brings DTR and RTS to pins.',
        ),
    },
    "Chip and board": {
        "DOCTOR_CHIP_UNSET": Entry(
            Level.NOTE,
            "The configuration does not say which chip to expect, so a swapped cable is noticed only by an image that does not"
            " fit.",
            'chip = "F756"; `bridged id NAME` tells.',
        ),
        "DOCTOR_CHIP_FOREIGN": Entry(
            Level.PROBLEM, "The chip speaks another protocol and cannot be flashed by bridged.", "Use its vendor's tool."
        ),
        "DOCTOR_LAYOUT_UNSURE": Entry(
            Level.WARNING,
            "How the flash of this chip is cut is not known well enough, so it is read, but neither erased nor written.",
            "Compare the reference manual with the named layouts and write `layout` into the configuration.",
        ),
        "DOCTOR_BOOT0_IGNORED": Entry(
            Level.WARNING,
            "With the option bytes as they leave the factory this chip does not look at the BOOT0 pin.",
            "Clear nBOOT_SEL once with a probe; docs/wiring.md has the table.",
        ),
        "DOCTOR_STARTUP_SHORT": Entry(
            Level.WARNING,
            "The configured startup_s is shorter than this chip needs from reset to its loader.",
            "Leave startup_s out: bridged knows the chip and tries later as well.",
        ),
        "DOCTOR_RATE_JITTER": Entry(
            Level.NOTE,
            "This chip measures the rate wrong now and then, and the configured one is higher than is safe.",
            "Leave baud out: bridged begins where this chip is sure. Where it is missed, jobs go at a lower one and say so.",
        ),
        "DOCTOR_STLINK_DEAF": Entry(
            Level.PROBLEM,
            "The port is an ST-LINK's virtual port, and the loader of this chip does not listen on the pins behind it.",
            "Wire a UART of the gateway to pins that the loader hears (docs/wiring.md).",
        ),
        "DOCTOR_STLINK_PORT": Entry(
            Level.NOTE,
            "The port is an ST-LINK's virtual port, which the loader hears on some boards with this chip and not on others.",
            "Look up in the board's manual to which pins its virtual port leads.",
        ),
        "DOCTOR_LOADER_PINS": Entry(
            Level.NOTE,
            "Which pins the loader of this chip hears.",
            "Keep the others steady; leave the target's own USB (PA11/PA12) unplugged until the job is done: it may win.",
        ),
        "DOCTOR_BOARD": Entry(Level.NOTE, "Traps of a known board with this chip.", "docs/wiring.md has the table."),
    },
}

# What a DOCTOR job (`bridged examine`) says.
TARGET_GROUPS: dict[str, dict[str, Entry]] = {
    "The application and NRST": {
        "DOCTOR_RESET_WORKS": Entry(Level.OK, "NRST low silences the application, and its release starts it."),
        "DOCTOR_NRST_NOT_WIRED": Entry(
            Level.WARNING,
            "No line drives NRST, so nothing can be tried a second time.",
            "Wire NRST: open-drain, low for reset; every recovery depends on it.",
        ),
        "DOCTOR_TALKS_IN_RESET": Entry(
            Level.PROBLEM,
            "While NRST was held low something went on speaking.",
            "NRST does not reach the chip, is inverted, or another device speaks on this line.",
        ),
        "DOCTOR_APPLICATION_SILENT": Entry(
            Level.NOTE,
            "No byte came from the application, before or after a reset.",
            "Normal for blank flash, or an application that is silent or speaks at another rate.",
        ),
        "DOCTOR_RESETS_ITSELF": Entry(
            Level.WARNING,
            "The application started several times within the time of one look.",
            "An external watchdog or a crash loop: stop it while flashing, or it resets the loader as well.",
        ),
        "DOCTOR_NO_APPLICATION": Entry(
            Level.NOTE,
            "The first two words of flash are no stack pointer and no reset vector: nothing there could start.",
            "Flash an image; where a boot loader elsewhere starts the application this is as it should be.",
        ),
    },
    "Into the loader": {
        "DOCTOR_LOADER_ANSWERS": Entry(Level.OK, "The loader answered at the first attempt: at which rate, after which delay."),
        "DOCTOR_LOADER_LATE": Entry(
            Level.NOTE,
            "The loader answered, but not at the first attempt.",
            "Nothing to do: jobs try as often. To be faster state `baud` or `startup_s` as the sentence says.",
        ),
        "DOCTOR_TURNAROUND": Entry(Level.OK, "What adapter, driver and loader add to every answer, and what that costs a job."),
        "DOCTOR_ADAPTER_SLOW": Entry(
            Level.WARNING,
            "The adapter or its driver is slow to hand on answers: more than a tenth of each job is spent waiting for it.",
            "FTDI: systemd/60-bridged.rules sets its latency timer to 1 ms; else use a UART of the machine itself.",
        ),
        "DOCTOR_NOTHING_HEARD": Entry(
            Level.PROBLEM,
            "No byte came from the target, with or without BOOT0.",
            "Check power and ground, TX to RX crossed, and the pins; unplug USB, which the loader may have chosen instead.",
        ),
        "DOCTOR_BOOT0_NOT_SEEN": Entry(
            Level.PROBLEM,
            "The target resets, but starts its application although BOOT0 is driven high.",
            "Measure BOOT0 at the chip during reset; option bits may ignore the pin, and the loader may listen on other pins.",
        ),
        "DOCTOR_LOADER_WITHOUT_BOOT0": Entry(
            Level.PROBLEM,
            "The loader starts although BOOT0 is low, and the flash is not empty: the application can never start.",
            "Measure BOOT0 at the chip: it may be stuck high or inverted; otherwise a boot address or option bit leads there.",
        ),
        "DOCTOR_RATE_OR_NOISE": Entry(
            Level.PROBLEM,
            "Something answers, but not understandably at any rate, or not for long.",
            "Another device on these pins, a target TX that is loaded (PA9 is VBUS on boards with USB OTG), a supply or a"
            " watchdog that resets it, or noise; try `baud = 57600`, check ground and pins.",
        ),
        "DOCTOR_LOOPBACK": Entry(
            Level.PROBLEM,
            "What was sent comes back: TX and RX are shorted, or the adapter echoes.",
            "Check the wiring between adapter and target.",
        ),
        "DOCTOR_WRONG_PARITY": Entry(
            Level.PROBLEM,
            "0x7F was acknowledged and Get refused: parity on the wire is not even.",
            "On a Raspberry Pi use a PL011 and not the mini UART (docs/wiring.md).",
        ),
        "DOCTOR_PORT_SETTINGS": Entry(
            Level.PROBLEM,
            "The driver of the port did not take even parity or the rate: read back, it is something else.",
            "On a Raspberry Pi use a PL011 and not the mini UART; with another adapter choose another `baud`.",
        ),
        "DOCTOR_REPEATED": Entry(
            Level.WARNING,
            "Commands had to be repeated: bytes are lost or changed on the wire, or the target resets by itself.",
            "Jobs recover, and are slow: shorten the cable, check ground and supply, or lower `baud`.",
        ),
        "DOCTOR_NOT_RESET": Entry(
            Level.WARNING,
            "The loader had been synchronised before it was reset.",
            "NRST does not reach the chip: it was still in the loader from an earlier session.",
        ),
        "DOCTOR_JUNK_BEFORE_ACK": Entry(Level.NOTE, "Bytes came before the ACK of 0x7F.", "Usually harmless noise."),
        "DOCTOR_BOOT0_NOT_WIRED": Entry(
            Level.WARNING, "No line drives BOOT0.", "Jobs that erase are refused unless they say entry=one-shot."
        ),
    },
    "What answers": {
        "DOCTOR_IDENTIFIED": Entry(Level.OK, "Chip, flash size, version of the loader."),
        "DOCTOR_WRONG_CHIP": Entry(
            Level.PROBLEM,
            "Another chip than configured answered: a swapped board or cable.",
            "Correct the wiring or the `chip` of the target.",
        ),
        "DOCTOR_UNKNOWN_CHIP": Entry(
            Level.PROBLEM, "The product id is in no table of this version.", "Report it, with its name."
        ),
        "DOCTOR_LAYOUT_UNKNOWN": Entry(
            Level.PROBLEM,
            "How the flash is cut into sectors could not be found out, so it is neither erased nor written.",
            "State `layout` in the target's configuration.",
        ),
        "DOCTOR_READ_PROTECTED": Entry(
            Level.PROBLEM,
            "Read Memory is refused while Get and Get ID are answered: readout protection is on (H5: product state).",
            "Removing it erases the whole flash; no job does that unless it says so (UNPROTECT, or unprotect=1 of a FLASH).",
        ),
        "DOCTOR_FLASH_REFUSED": Entry(
            Level.PROBLEM,
            "The loader refuses to read the first word of flash, though Read Memory itself is allowed.",
            "Another part than its product id says, or bytes are lost: lower `baud`, compare the marking of the chip.",
        ),
        "DOCTOR_GET_COUNT_ODD": Entry(
            Level.NOTE, "Get announced another number of commands than it listed.", "Known of the H743 loader V9.0; understood."
        ),
        "DOCTOR_QUIRK": Entry(
            Level.NOTE, "A documented limitation of this version of the loader.", "Nothing to do: sessions deal with it."
        ),
    },
    "Option bits that decide what starts": {
        "DOCTOR_BOOT_OPTION": Entry(Level.OK, "An option bit that decides what starts, and leads where it should."),
        "DOCTOR_OPTION_UNREADABLE": Entry(
            Level.NOTE,
            "An option bit that decides what starts cannot be read through this loader.",
            "Nothing to do while entering the loader works; otherwise look with a probe.",
        ),
        "DOCTOR_OPTION_BYTES": Entry(Level.OK, "The option bytes that are known by name."),
        "DOCTOR_WRITE_PROTECTED": Entry(
            Level.WARNING,
            "Sectors are write-protected: the loader acknowledges their erase and write, and does neither.",
            "Jobs that need them fail. `UNPROTECT what=write` removes it where it is not wanted.",
        ),
        "DOCTOR_PCROP": Entry(
            Level.WARNING,
            "Sectors are protected by PCROP: they can be executed, and neither read nor written.",
            "Keep them out of the image; only removing readout protection, which erases everything, ends it.",
        ),
        "DOCTOR_OPTION_BYTES_BROKEN": Entry(
            Level.PROBLEM,
            "Option bytes and their complements do not agree: a write was cut off, and the part takes safe values instead.",
            "Write the fields again (OPTION-BYTES set=...), then cycle the power.",
        ),
        "DOCTOR_ENTRY_WOULD_BE_LOST": Entry(
            Level.PROBLEM,
            "Option bits ignore the BOOT0 pin: after an erase nothing could start the loader again.",
            "Correct the option bytes first.",
        ),
        "DOCTOR_APPLICATION_UNREACHABLE": Entry(
            Level.PROBLEM,
            "Option bits lead past the flash: the application cannot start, however well it was flashed.",
            "Write the factory value back.",
        ),
        "DOCTOR_OTHER_BANK": Entry(
            Level.WARNING,
            "The option bit BFB2 is set: at each start the loader chooses the bank.",
            "Flash the bank that is started, or clear BFB2; jobs do not, for it belongs to the application.",
        ),
        "DOCTOR_EMPTY": Entry(
            Level.NOTE,
            "The flash is empty: this part starts its loader by itself, also with BOOT0 low, and remembers that.",
            "After the first flash it needs a power cycle, or is started by Go; the job says which (boot=).",
        ),
    },
}

GROUPS = {**MACHINE_GROUPS, **TARGET_GROUPS}

CATALOG: dict[str, Entry] = {code: entry for group in GROUPS.values() for code, entry in group.items()}


def codes(groups: Mapping[str, Mapping[str, Entry]]) -> set[str]:
    return {code for group in groups.values() for code in group}


def reference() -> str:
    """The table for the documentation."""
    halves = (("The machine half: `bridged doctor`", MACHINE_GROUPS), ("The target half: `bridged examine`", TARGET_GROUPS))
    return "\n".join(f"### {title}\n\n{_tables(groups)}" for title, groups in halves)


def _tables(groups: Mapping[str, Mapping[str, Entry]]) -> str:
    out = []
    for title, group in groups.items():
        out.append(f"#### {title}\n\n| code | level | what it means | what to do |\n|---|---|---|---|")
        out += [f"| `{code}` | {entry.level.value} | {entry.when} | {entry.remedy} |" for code, entry in group.items()]
        out.append("")
    return "\n".join(out)

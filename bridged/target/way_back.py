"""P10: the proof that the loader can be entered again when the application is gone, and what a person must know before.

Document: AN2606 (activation, option bits that decide whether BOOT0 is obeyed, the choice between two banks).
"""

from __future__ import annotations

from bridged.errors import EntryWouldBeLost
from bridged.events import Warned
from bridged.protocol.flow import Flow, Report
from bridged.target.identify import Known, read_option
from bridged.target.request import Request


def check_entry(request: Request, known: Known) -> Flow[None]:
    """Prove that the loader can be entered again when the application is gone.

    The pin must be wired (or held by a person) and obeyed. Where option bits decide whether it is obeyed they are read, as
    far as the loader allows; a part whose loader starts by itself because its flash is empty proves nothing by having entered.
    """
    chip, wiring = known.chip, request.wiring
    for unreachable in chip.app_checks:
        word = yield from read_option(chip, unreachable.option, known.line)
        if word is not None and not unreachable.holds(word):
            text = f"{unreachable.option.name} is {unreachable.option.value(word):#06x}: {unreachable.otherwise}"
            yield Report(Warned("APPLICATION_UNREACHABLE", text))
    if text := (yield from other_bank(known)):
        yield Report(Warned("OTHER_BANK", text))
    if request.one_shot:
        return
    boot0, reset = wiring.has_boot0 or wiring.boot0_by_hand, wiring.has_reset or wiring.has_power
    if missing := [name for name, ok in (("BOOT0", boot0), ("NRST", reset)) if not ok]:
        raise EntryWouldBeLost(
            f"{' and '.join(missing)} not wired: after the erase nothing here could start the loader again",
            missing=" ".join(missing),
        )
    unread: list[str] = []
    for entry in chip.entry_checks:
        word = yield from read_option(chip, entry.option, known.line)
        if word is None:
            unread.append(entry.option.name)
        elif entry.option.value(word) not in entry.values:
            raise EntryWouldBeLost(
                f"{chip.title}: {entry.option.name} at {entry.option.address:#010x} is {entry.option.value(word):#x}: "
                f"{entry.otherwise}",
                option=entry.option.name,
                value=entry.option.value(word),
            )
    if unread and not chip.boot0_pin_obeyed:
        raise EntryWouldBeLost(
            f"{chip.title}: {', '.join(unread)} cannot be read, and the pin is ignored as this part comes from the factory",
            option=",".join(unread),
        )
    if unread:
        yield Report(Warned("ENTRY_UNPROVEN", f"{', '.join(unread)} cannot be read: the factory setting is assumed"))


def other_bank(known: Known) -> Flow[str]:
    """What a person must know of a part whose loader chooses between two banks at each start; empty where it does not."""
    chip, second = known.chip, next((s for s in known.flash.sectors if s.bank == 2), None) if known.flash else None
    if chip.bank_choice is None or second is None:
        return ""
    word = yield from read_option(chip, chip.bank_choice, known.line)
    if word is None or not chip.bank_choice.value(word):
        return ""
    data = yield from known.line.read_twice(second.address, 4)
    holds = any(r.start < int.from_bytes(data, "little") <= r.end for r in chip.ram)
    text = (
        f"{chip.bank_choice.name} is 1: bank 2 ({second.address:#010x}) is started where a stack pointer is there, else bank 1"
    )
    return f"{text}; {'there is one now: what is in bank 1 does not start' if holds else 'there is none now'}"

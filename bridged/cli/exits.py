"""Exit codes: what the end of a command means for a script. Part of the public interface."""

from __future__ import annotations

from enum import IntEnum

from bridged.protocol.reply import Reply


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    MISMATCH = 3
    NO_TARGET = 4
    ROLLED_BACK = 5
    REJECTED = 6
    CANCELED = 7
    TIMED_OUT = 8
    UNREACHABLE = 69  # EX_UNAVAILABLE
    BUSY = 75  # EX_TEMPFAIL
    NOT_ALLOWED = 77  # EX_NOPERM
    INTERRUPTED = 130  # 128 + SIGINT


EXIT_TEXT = {
    Exit.DONE: "done (also: nothing was to be done)",
    Exit.FAILED: "the job failed",
    Exit.USAGE: "wrong arguments, or no such file, image or job",
    Exit.MISMATCH: "verify found a difference",
    Exit.NO_TARGET: "no such target, or it does not answer",
    Exit.ROLLED_BACK: "failed, and the previous image was restored",
    Exit.REJECTED: "refused: the image does not suit the target, or policy",
    Exit.CANCELED: "canceled",
    Exit.TIMED_OUT: "timed out",
    Exit.UNREACHABLE: "the gateway cannot be reached",
    Exit.BUSY: "busy; try again later",
    Exit.NOT_ALLOWED: "not allowed",
    Exit.INTERRUPTED: "interrupted by Ctrl-C; a job goes on",
}
_BY_STATE = {
    "rolled_back": Exit.ROLLED_BACK,
    "rejected": Exit.REJECTED,
    "canceled": Exit.CANCELED,
    "timed_out": Exit.TIMED_OUT,
}
_BY_ERROR = {
    "VERIFY_MISMATCH": Exit.MISMATCH,
    "UNKNOWN_TARGET": Exit.NO_TARGET,
    "CANCELED": Exit.CANCELED,
    "DEADLINE_EXCEEDED": Exit.TIMED_OUT,
    "WAIT_TIMEOUT": Exit.TIMED_OUT,
    "DAEMON_UNREACHABLE": Exit.UNREACHABLE,
    "NOT_ALLOWED": Exit.NOT_ALLOWED,
    "LOGIN_FIRST": Exit.NOT_ALLOWED,
    "BAD_TOKEN": Exit.NOT_ALLOWED,
    "TARGET_BUSY": Exit.BUSY,
    "PORT_BUSY": Exit.BUSY,
    "NOT_CANCELLABLE": Exit.BUSY,
    "ID_CONFLICT": Exit.USAGE,
    "IMAGE_TOO_LARGE": Exit.USAGE,
    "CONFIG": Exit.USAGE,
}
_BY_REPLY = {
    404: Exit.USAGE,
    421: Exit.BUSY,
    423: Exit.BUSY,
    429: Exit.BUSY,
    450: Exit.NO_TARGET,
    452: Exit.BUSY,
    500: Exit.USAGE,
    501: Exit.USAGE,
    502: Exit.USAGE,
    550: Exit.REJECTED,
    553: Exit.REJECTED,
}


def exit_code(reply: Reply) -> Exit:
    """What a last reply line means for a script: by the state of the job, then by the error, then by the reply code."""
    if reply.code < 400:
        return Exit.DONE
    state = _BY_STATE.get(str(reply.data.get("state", "")))
    return state or _BY_ERROR.get(reply.text) or _BY_REPLY.get(reply.code) or Exit.FAILED

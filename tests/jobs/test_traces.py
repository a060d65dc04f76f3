"""Flight recordings on disk: whole or not at all, and only the last few. Power cuts: tests/images/test_power_cuts.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bridged.errors import StorageFull
from bridged.jobs.traces import Traces


def text_of(traces: Traces, job_id: str) -> str | None:
    path = traces.file(job_id)
    return path.read_text() if path is not None else None


def test_a_trace_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    traces = Traces(tmp_path, 20)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        traces.save("job-1", "> 7F\n")
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_traces_are_kept(tmp_path: Path) -> None:
    traces = Traces(tmp_path, 3)
    for i in range(6):
        path = traces.save(f"job-{i}", f"> {i:02X}\n")
        assert path is not None
        os.utime(path, ns=(i, i))
    assert [text_of(traces, f"job-{i}") for i in range(6)] == [None, None, None, "> 03\n", "> 04\n", "> 05\n"]
    traces.save("job-3", "again")
    assert text_of(traces, "job-3") == "again"
    assert len(list(tmp_path.iterdir())) == 3
    assert Traces(tmp_path / "none", 0).save("job-1", "x") is None


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "job-1.txt.tmp").write_bytes(b"half")
    assert Traces(tmp_path, 3).file("job-1") is None
    assert list(tmp_path.iterdir()) == []

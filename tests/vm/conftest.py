"""Fixtures of the VM tests. One boot and one installation serve all tests of a run; ``make vm-test`` starts them.

What this machine lacks skips them with the remedy, and fails them where ``CI`` is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import missing
from tests.vm import build, container
from tests.vm.bench import Bench
from tests.vm.container import Container
from tests.vm.inside import install, set_up
from tests.vm.record import failed

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A VM is twenty times slower than this machine, and boots may be among what a test does."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(600 + float(os.environ.get("BRIDGED_IDLE_S", "0"))))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "tests/vm/" in report.nodeid:
        failed(report.nodeid.removeprefix("tests/vm/"))


@pytest.fixture(scope="session")
def guest() -> build.Guest:
    if reason := build.lacking():
        missing("a virtual machine", reason)
    return build.build()


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this checkout. ``BRIDGED_DEB`` names one that was built before."""
    if given := os.environ.get("BRIDGED_DEB"):
        return Path(given)
    if shutil.which("python3.11") is None or shutil.which("dpkg-deb") is None:
        missing("python3.11 or dpkg-deb", "apt install python3.11 dpkg")
    from debian.build import build as build_package
    from debian.build import version_of_the_project

    return build_package("amd64", "3.11", tmp_path_factory.mktemp("deb"), version_of_the_project())


@pytest.fixture(scope="session")
def rig(guest: build.Guest, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(guest, package, tmp_path_factory.mktemp("vm")) as made:
        yield made


@pytest.fixture
def bench(rig: Bench) -> Bench:
    """The rig as it should be, whatever the test before left, with no line moved yet."""
    rig.recover()
    rig.forget_moves()
    return rig


@pytest.fixture(scope="session")
def installed(guest: build.Guest, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A container with the package in it and a target beside it."""
    if reason := container.lacking():
        missing("a container", reason)
    with Container(guest, tmp_path_factory.mktemp("container")) as inside:
        install(inside, package)
        set_up(inside)
        yield inside

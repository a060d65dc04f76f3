"""Settings that hold for every test. Tools that may be missing: ``tests.support``."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support import in_ci

# No wall-clock gate anywhere: on a loaded machine of two cores both of these fail without anything being wrong. In CI the
# examples are the same in every run, so that a red run can be repeated.
settings.register_profile("bridged", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=in_ci())
settings.load_profile("bridged")

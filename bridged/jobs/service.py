"""``Jobs``: submit, run, watch, cancel. One queue and one running job for each target; targets run in parallel."""

from __future__ import annotations

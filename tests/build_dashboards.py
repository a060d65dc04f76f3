"""The Grafana dashboards in config/grafana; ``tests.build_docs`` writes them.

A dashboard as Grafana exports it is a thousand lines of layout around a few queries; here it is the queries. Which metrics they
may name is what a daemon exports: ``tests/test_observability.py`` holds both against each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

WIDTH = 24
SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """``queries``: expression and legend. ``unit`` and ``kind`` as Grafana names them; ``width`` in 24ths."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    text: str = ""


G = 'instance=~"$gateway"'
T = f'{G},target=~"$target"'
OVERVIEW = (
    Panel("Gateways that answer", (('sum(up{job="bridged"})', ""),), kind="stat", width=4, height=4),
    Panel(
        "Targets idle or at work",
        ((f'sum(bridged_target_state{{{G},state=~"idle|busy"}})', ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Targets absent or broken",
        ((f'sum(bridged_target_state{{{G},state=~"absent|broken"}})', ""),),
        kind="stat",
        width=4,
        height=4,
        text="absent: no port or no lines; broken: NRST or BOOT0 could not be released",
    ),
    Panel("Jobs at work", ((f"sum(bridged_job_running{{{G}}})", ""),), kind="stat", width=4, height=4),
    Panel("Jobs that wait", ((f"sum(bridged_jobs_queued{{{G}}})", ""),), kind="stat", width=4, height=4),
    Panel(
        "Failed within a day",
        ((f'sum(increase(bridged_jobs_total{{{G},result=~"failed|timed_out|rolled_back"}}[24h]))', ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Jobs that ended",
        ((f"sum by (result) (increase(bridged_jobs_total{{{G}}}[$__rate_interval]))", "{{result}}"),),
        width=12,
    ),
    Panel(
        "Why jobs failed",
        ((f"sum by (code) (increase(bridged_job_failures_total{{{G}}}[$__range])) > 0", "{{code}}"),),
        kind="bargauge",
        width=12,
        text="codes are explained in docs/errors.md",
    ),
    Panel(
        "How long a job takes",
        (
            (
                f"histogram_quantile(0.5, sum by (le, kind) (rate(bridged_job_duration_seconds_bucket{{{G}}}[1h])))",
                "{{kind}}, half",
            ),
            (
                f"histogram_quantile(0.95, sum by (le, kind) (rate(bridged_job_duration_seconds_bucket{{{G}}}[1h])))",
                "{{kind}}, 95 %",
            ),
        ),
        "s",
    ),
    Panel(
        "Targets",
        ((f"bridged_target_info{{{G}}}", ""),),
        kind="table",
        width=16,
        text="chip and the image that was last proven in it",
    ),
    Panel(
        "Uploads", ((f"sum by (instance) (rate(bridged_upload_bytes_total{{{G}}}[$__rate_interval]))", "{{instance}}"),), "Bps"
    ),
    Panel(
        "Space for images",
        ((f"bridged_staging_bytes{{{G}}} / bridged_staging_limit_bytes{{{G}}}", "{{instance}}"),),
        "percentunit",
    ),
    Panel("Wrong tokens", ((f"increase(bridged_auth_failures_total{{{G}}}[$__rate_interval])", "{{instance}}"),)),
    Panel(
        "Delay of the event loop",
        ((f"bridged_event_loop_lag_seconds{{{G}}}", "{{instance}}"),),
        "s",
        text="sessions are processes of their own and not delayed by this",
    ),
    Panel(
        "Certificates end in",
        ((f"bridged_tls_certificate_expiry_timestamp_seconds{{{G}}} - time()", "{{instance}}: {{setting}}"),),
        "s",
        "stat",
        text="less than three weeks is an alert; nothing is shown where there is no TLS",
    ),
    Panel("Memory of the daemon", ((f"process_resident_memory_bytes{{{G}}}", "{{instance}}"),), "bytes"),
    Panel(
        "Processor time",
        (
            (f"rate(process_cpu_seconds_total{{{G}}}[$__rate_interval])", "{{instance}}, daemon"),
            (f"sum by (instance) (rate(bridged_session_cpu_seconds_total{{{G}}}[$__rate_interval]))", "{{instance}}, sessions"),
        ),
        "percentunit",
    ),
)
TARGET = (
    Panel(
        "State",
        ((f"bridged_target_state{{{T}}} == 1", "{{target}}: {{state}}"),),
        kind="stat",
        width=6,
        height=4,
    ),
    Panel("Progress of the phase", ((f"bridged_job_progress_ratio{{{T}}}", "{{target}}"),), "percentunit", "gauge", 6, 4),
    Panel("Jobs that wait", ((f"bridged_jobs_queued{{{T}}}", "{{target}}"),), kind="stat", width=6, height=4),
    Panel(
        "Last success",
        ((f"time() - (bridged_last_success_timestamp_seconds{{{T}}} > 0)", "{{target}}"),),
        "s",
        "stat",
        6,
        4,
        text="time since then; empty: never",
    ),
    Panel(
        "Jobs that ended",
        ((f"sum by (kind, result) (increase(bridged_jobs_total{{{T}}}[$__rate_interval])) > 0", "{{kind}} {{result}}"),),
        width=12,
    ),
    Panel(
        "Why jobs failed",
        ((f"sum by (code) (increase(bridged_job_failures_total{{{T}}}[$__range])) > 0", "{{code}}"),),
        kind="bargauge",
        width=12,
    ),
    Panel("Flash", ((f"sum by (op) (increase(bridged_flash_bytes_total{{{T}}}[$__rate_interval]))", "{{op}}"),), "bytes"),
    Panel("Sectors", ((f"sum by (op) (increase(bridged_sectors_total{{{T}}}[$__rate_interval]))", "{{op}}"),)),
    Panel(
        "Commands that were repeated",
        ((f"sum by (step) (increase(bridged_rom_retries_total{{{T}}}[$__rate_interval])) > 0", "{{step}}"),),
        text="what the wire or the target cost; every accident was recovered or ended its job",
    ),
    Panel(
        "Errors on the UART",
        ((f"sum by (type) (increase(bridged_uart_errors_total{{{T}}}[$__rate_interval]))", "{{type}}"),),
        text="as the kernel counted them; a break is how many targets start",
    ),
    Panel(
        "Bytes on the UART",
        ((f"sum by (direction) (rate(bridged_uart_bytes_total{{{T}}}[$__rate_interval]))", "{{direction}}"),),
        "Bps",
    ),
    Panel(
        "Time to an acknowledgement",
        ((f"histogram_quantile(0.95, sum by (le, step) (rate(bridged_rom_ack_seconds_bucket{{{G}}}[1h])))", "{{step}}, 95 %"),),
        "s",
        text="of all targets of the gateway",
    ),
    Panel("A turnaround of the last session", ((f"bridged_target_turnaround_seconds{{{T}}}", "{{target}}"),), "s"),
    Panel(
        "Console",
        (
            (f"sum by (role) (bridged_console_clients{{{T}}})", "{{role}}s"),
            (f"sum(increase(bridged_console_dropped_bytes_total{{{T}}}[$__rate_interval]))", "bytes not passed on"),
        ),
    ),
    Panel(
        "Second-stage loader",
        ((f"sum by (result) (increase(bridged_second_stage_sessions_total{{{T}}}[$__rate_interval]))", "{{result}}"),),
    ),
    Panel("Memory of the last session", ((f"bridged_session_memory_bytes{{{T}}}", "{{target}}"),), "bytes"),
)
# Of gateways with a connector: what roll-outs reach.
ROLLOUTS = (
    Panel("Gateways connected", ((f"sum(bridged_fleet_connected{{{G}}})", ""),), kind="stat", width=4, height=4),
    Panel(
        "Not connected",
        ((f"sum(bridged_fleet_connected{{{G}}} == bool 0)", ""),),
        kind="stat",
        width=4,
        height=4,
        text="local jobs do not mind; what there is to tell is told afterwards",
    ),
    Panel("Targets as wanted", ((f"sum(bridged_target_drifted{{{G}}} == bool 0)", ""),), kind="stat", width=4, height=4),
    Panel(
        "Targets that drifted",
        ((f"sum(bridged_target_drifted{{{G}}})", ""),),
        kind="stat",
        width=4,
        height=4,
        text="what was last proven is not what the last roll-out wanted: flashed by hand, failed, or still to be done",
    ),
    Panel("Commands that wait", ((f"sum(bridged_fleet_waiting{{{G}}})", ""),), kind="stat", width=4, height=4),
    Panel("Reports not told", ((f"sum(bridged_fleet_untold_reports{{{G}}})", ""),), kind="stat", width=4, height=4),
    Panel(
        "Commands that came",
        ((f"sum by (what) (increase(bridged_fleet_commands_total{{{G}}}[$__rate_interval]))", "{{what}}"),),
        width=12,
        text="refused: malformed, or older than what the gateway remembers; its log says which",
    ),
    Panel(
        "Commands that ended",
        ((f"sum by (result) (increase(bridged_fleet_ended_total{{{G}}}[$__rate_interval])) > 0", "{{result}}"),),
        width=12,
    ),
    Panel(
        "Artifacts",
        ((f"sum by (instance) (rate(bridged_fleet_download_bytes_total{{{G}}}[$__rate_interval]))", "{{instance}}"),),
        "Bps",
    ),
    Panel(
        "Connections",
        ((f"sum by (connector) (increase(bridged_fleet_connections_total{{{G}}}[$__rate_interval]))", "{{connector}}"),),
        text="that were made; many of them are a broker or a link that does not hold",
    ),
    Panel("Which targets drifted", ((f"bridged_target_drifted{{{G}}} == 1", ""),), kind="table"),
)

# Hundreds of gateways: what stands out, and what runs where.
FLEET = (
    Panel("Gateways that answer", (('sum(up{job="bridged"})', ""),), kind="stat", width=4, height=4),
    Panel("Gateways that are silent", (('sum(up{job="bridged"} == bool 0)', ""),), kind="stat", width=4, height=4),
    Panel("Targets", (("count(bridged_target_info)", ""),), kind="stat", width=4, height=4),
    Panel(
        "Targets absent or broken",
        (('sum(bridged_target_state{state=~"absent|broken"})', ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Succeeded within a day",
        (('sum(increase(bridged_jobs_total{result="succeeded"}[24h]))', ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Not done within a day",
        (('sum(increase(bridged_jobs_total{result=~"failed|timed_out|rolled_back"}[24h]))', ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Targets by firmware",
        (("count by (firmware) (bridged_target_info)", "{{firmware}}"),),
        width=12,
        text="the image that was last proven: a roll-out is one curve that rises and one that falls",
    ),
    Panel(
        "Jobs that ended, an hour",
        (("sum by (result) (increase(bridged_jobs_total[1h]))", "{{result}}"),),
        width=12,
    ),
    Panel(
        "Why jobs failed",
        (("topk(10, sum by (code) (increase(bridged_job_failures_total[$__range])) > 0)", "{{code}}"),),
        kind="bargauge",
        text="codes are explained in docs/errors.md",
    ),
    Panel(
        "Gateways with the most failures",
        (
            (
                'topk(10, sum by (instance) (increase(bridged_jobs_total{result=~"failed|rolled_back"}[$__range])) > 0)',
                "{{instance}}",
            ),
        ),
        kind="bargauge",
    ),
    Panel(
        "Gateways with the most errors on UARTs",
        (("topk(10, sum by (instance) (increase(bridged_uart_errors_total[$__range])) > 0)", "{{instance}}"),),
        kind="bargauge",
        text="wiring, or the supply of a site",
    ),
    Panel("Gateways without their broker", (("sum(bridged_fleet_connected == bool 0)", ""),), kind="stat", width=4, height=4),
    Panel("Gateways by version", (("count by (version) (bridged_build_info)", "{{version}}"),), kind="bargauge"),
    Panel(
        "Silent gateways",
        (('up{job="bridged"} == 0', "{{instance}}"),),
        kind="table",
    ),
    Panel(
        "Targets absent or broken, by name",
        (('bridged_target_state{state=~"absent|broken"} == 1', ""),),
        kind="table",
    ),
)


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    table = panel.kind == "table"
    found: dict[str, Any] = {
        "id": number,
        "title": panel.title,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "noValue": "-"}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend or "__auto",
                "instant": panel.kind in ("stat", "table", "gauge", "bargauge"),
                "range": panel.kind == "timeseries",
                **({"format": "table"} if table else {}),
            }
            for at, (expression, legend) in enumerate(panel.queries)
        ],
    }
    if panel.text:
        found["description"] = panel.text
    if table:
        hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
        found["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return found


def dashboard(
    uid: str, title: str, panels: tuple[Panel, ...], *, by_gateway: bool = True, by_target: bool = False
) -> dict[str, Any]:
    laid: list[dict[str, Any]] = []
    x = y = row = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH:
            x, y, row = 0, y + row, 0
        laid.append(_panel(number, panel, x, y))
        x, row = x + panel.width, max(row, panel.height)
    variables: list[dict[str, Any]] = [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
    if by_gateway:
        variables.append(_variable("gateway", "Gateway", "label_values(bridged_build_info, instance)"))
    if by_target:
        variables.append(_variable("target", "Target", 'label_values(bridged_target_state{instance=~"$gateway"}, target)'))
    return {
        "uid": uid,
        "title": title,
        "tags": ["bridged"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "templating": {"list": variables},
        "panels": laid,
    }


def dashboards() -> dict[str, str]:
    """File names and what belongs into them."""
    found = {
        "bridged-gateway.json": dashboard("bridged-gateway", "bridged: gateways", OVERVIEW),
        "bridged-fleet.json": dashboard("bridged-fleet", "bridged: a fleet", FLEET, by_gateway=False),
        "bridged-rollouts.json": dashboard("bridged-rollouts", "bridged: roll-outs", ROLLOUTS),
        "bridged-target.json": dashboard("bridged-target", "bridged: a target", TARGET, by_target=True),
    }
    return {name: json.dumps(data, indent=1) + "\n" for name, data in found.items()}

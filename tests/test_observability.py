"""Alerts, dashboards and the metrics that they speak of: promtool holds the rules, a real Prometheus scrapes a real daemon."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridged.api.metrics import Metrics
from bridged.errors import BY_CODE
from bridged.jobs.model import TERMINAL, JobKind
from tests.build_dashboards import dashboards
from tests.e2e.gateway import Gateway, pairs, wait_for
from tests.support import free_port, require_tool
from tests.test_client import Certificates

CONFIG = Path(__file__).parents[1] / "config"
RULES = CONFIG / "prometheus" / "bridged.rules.yml"
FLEET = re.compile("bridged_fleet_|bridged_target_drifted")  # Who has no fleet exports none of these.
NAME = re.compile(r"\b(?:bridged|process)_[a-z_]+\b(?!\()")
# Of prometheus_client's ProcessCollector, as it is on Linux.
PROCESS = {"process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def names() -> set[str]:
    """Every name that a query may have."""
    found = set(PROCESS)
    for one in Metrics().described():
        found.add(one.name)
        if one.kind == "histogram":
            found |= {f"{one.name}_{end}" for end in ("bucket", "count", "sum")}
    return found


def labels() -> dict[str, set[str]]:
    """The labels of each name, with those that Prometheus adds."""
    found: dict[str, set[str]] = {}
    for one in Metrics().described():
        for end in ("", "_bucket", "_count", "_sum"):
            found[one.name + end] = {*one.labels, "instance", "job", "le"}
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the query."""
    for alert, text in re.findall(r"- alert: (\w+)\n\s+expr: (\|(?:\n {10}.*)+|.*)", RULES.read_text()):
        yield alert, text
    for file, text in dashboards().items():
        for panel in json.loads(text)["panels"]:
            for query in panel["targets"]:
                yield f"{file}: {panel['title']}", query["expr"]


def test_queries_name_metrics_labels_and_values_that_exist() -> None:
    known, of = names(), labels()
    results, seen = {str(state) for state in TERMINAL}, 0
    for where, query in expressions():
        found = NAME.findall(query)
        assert found or "up{" in query, f"{where}: no metric in {query}"
        assert set(found) <= known, f"{where}: {set(found) - known}"
        for name, inside in re.findall(r"\b(bridged_\w+)\{([^}]*)\}", query):
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', inside):
                assert label in of[name], f"{where}: {name} has no label {label}"
                if label == "result" and name == "bridged_jobs_total":
                    assert set(value.split("|")) <= results, f"{where}: {value}"
                seen += 1
    assert seen > 50, "the queries were read"


def test_every_metric_is_of_use_to_somebody() -> None:
    """On a dashboard or in an alert; the rest is named here, with its reason."""
    asked = {name.removesuffix("_bucket") for _, query in expressions() for name in NAME.findall(query)}
    left = {one.name for one in Metrics().described()} - asked
    assert left == {
        "bridged_config_last_reload_success_timestamp_seconds",
        "bridged_job_phase_duration_seconds",  # for questions about one kind of job
        "bridged_line_connections",
        "bridged_uploads_resumed_total",
    }


@pytest.mark.timeout(400)
def test_the_rules_and_what_they_do_on_made_up_days() -> None:
    promtool = require_tool("promtool", "prometheus")
    for words in (["check", "rules", RULES.name], ["test", "rules", "bridged.rules.test.yml"]):
        done = subprocess.run([promtool, *words], cwd=RULES.parent, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = set(
        re.findall(r"alertname: (\w+)\s+eval_time: \S+\s+exp_alerts:", (RULES.parent / "bridged.rules.test.yml").read_text())
    )
    assert tested == set(re.findall(r"- alert: (\w+)", RULES.read_text())), "each alert fires on a day of its own"


def ask(port: int, path: str, **options: str) -> Any:
    query = f"?{urllib.parse.urlencode(options)}" if options else ""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}{query}", timeout=10) as answer:
        return json.load(answer)["data"]


def test_a_real_prometheus_scrapes_a_real_daemon(tmp_path: Path) -> None:
    prometheus = require_tool("prometheus", "prometheus")
    scraped, over_tls, port = free_port(), free_port(), free_port()
    certificate, key = Certificates(tmp_path).make("gw.example")
    # Beside the listener on loopback the way from elsewhere, as docs/metrics.md has it.
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{RULES}']\nscrape_configs:\n"
        f"- {{job_name: bridged, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}\n"
        f"- {{job_name: elsewhere, scheme: https, authorization: {{credentials_file: '{tmp_path}/token'}},"
        f" tls_config: {{ca_file: '{tmp_path}/ca.pem', server_name: gw.example}},"
        f" static_configs: [{{targets: ['127.0.0.1:{over_tls}']}}]}}\n"
    )
    tls = f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n[auth]\nloopback = []\n'
    made = Gateway(tmp_path, {"m1": "F103xB"}, extra=tls, metrics=f"127.0.0.1:{scraped}", http=f"tls:127.0.0.1:{over_tls}")
    with made as gateway:
        with contextlib.closing(gateway.connect()) as client:
            assert client.do("RESET m1 wait=1")[0] == 250
            assert client.do("RESET nobody")[0] == 404
            assert client.do("TOKEN add prometheus scope=read")[0] == 250
            (tmp_path / "token").write_text(pairs(" ".join(client.lines))["token"])
        assert gateway.daemon is not None
        (gateway.root / "bridged.toml").write_text("[gateway]\nnmae = 1\n")
        gateway.daemon.send_signal(signal.SIGHUP)
        server = subprocess.Popen(
            [
                *(prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"),
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:

            def value(query: str) -> Any:
                try:
                    found = ask(port, "query", query=query)["result"]
                except OSError:
                    return None
                return found[0]["value"][1] if found else None

            for job in ("bridged", "elsewhere"):
                assert wait_for(f"a scrape of {job}", lambda job=job: value(f'up{{job="{job}"}}') == "1")
                assert value(f'bridged_jobs_total{{job="{job}",target="m1",kind="reset",result="succeeded"}}') == "1"
                assert value(f'sum(bridged_jobs_total{{job="{job}",target="m1"}})') == "1"
            left_s = value("bridged_tls_certificate_expiry_timestamp_seconds{setting='tls.certificate'} - time()")
            assert 0 < float(left_s) <= 86400, "made for a day"
            assert wait_for("the mistake", lambda: value("bridged_config_last_reload_successful") == "0")
            wait_for(
                "its alert",
                lambda: any(a["labels"]["alertname"] == "BridgedConfigurationRefused" for a in ask(port, "alerts")["alerts"]),
            )
            exported = {name for name in ask(port, "label/__name__/values") if name.startswith("bridged_")}
            own = {one.name for one in Metrics().described() if not FLEET.match(one.name)}
            assert own - exported <= {"bridged_rom_retries_total"} | {
                one.name for one in Metrics().described() if one.kind == "histogram"
            }, "all that is documented is exported"
            assert {re.sub("_(bucket|count|sum)$", "", name) for name in exported} <= own, "all that is exported is documented"
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.parametrize("file", sorted(dashboards()))
def test_a_dashboard_fits_its_grid(file: str) -> None:
    data = json.loads((CONFIG / "grafana" / file).read_text())
    taken: set[tuple[int, int]] = set()
    for panel in data["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    assert len({panel["id"] for panel in data["panels"]}) == len(data["panels"])


def test_failure_codes_are_labels_of_the_catalogue() -> None:
    metrics = Metrics(["m1"])
    page = metrics.render()[0].decode()
    codes = set(re.findall(r'bridged_job_failures_total\{code="(\w+)"', page))
    assert codes
    assert codes <= set(BY_CODE)
    kinds = set(re.findall(r'bridged_jobs_total\{kind="([a-z-]+)"', page))
    assert kinds == {str(kind) for kind in JobKind}

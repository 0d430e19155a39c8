"""The containers' health check and their way to Prometheus, run for real against a real run."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from test_runtime import SCENE, first_status, start, wait_for
from test_runtime import run_dir as run_dir

from pipeline.config import load_config
from pipeline.live import DEFAULT_METRICS
from pipeline.watch import read_figures

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
METRICS = yaml.safe_load((ROOT / "docker" / "compose.metrics.yaml").read_text())["services"]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def health(address):
    """What the health check says of a run at this address: exit code and its last word."""
    marker, program, *words = COMPOSE["pipeline"]["healthcheck"]["test"]
    assert (marker, program) == ("CMD", "python")
    assert sum(DEFAULT_METRICS in word for word in words) == 1
    words = [word.replace(DEFAULT_METRICS, address) for word in words]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=20)
    return result.returncode, (result.stderr.splitlines() or [""])[-1]


def page(last):
    return f"# TYPE x gauge\nirst_last_publish_timestamp_seconds {last}\n".encode()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (page(time.time() + 1000), 0),
        (page(time.time() - 31), 1),
        (page(0.0), 1),
        (b"up 1\n", 1),
    ],
)
def test_the_health_check_asks_for_targets_of_late(tmp_path, content, code):
    (tmp_path / "metrics").write_bytes(content)
    address = free_address()
    port = address.split(":")[1]
    words = [sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        wait_for(lambda: answers(f"http://{address}/"))
        assert health(address)[0] == code
        server.kill()
        server.wait()
    assert health(address)[0] == 1


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def test_a_run_is_healthy_and_its_figures_reach_a_prometheus_beyond_its_loopback(run_dir):
    assert load_config(ROOT / "configs" / "container.yaml").telemetry.metrics == DEFAULT_METRICS
    address, outside = free_address(), free_address().replace("127.0.0.1", "127.0.0.2")
    config = SCENE.format(rate=20, folder=run_dir) + f"telemetry: {{metrics: '{address}'}}\n"
    program, script, listen, source = METRICS["metrics"]["entrypoint"]
    assert (program, source) == ("python", f"http://{DEFAULT_METRICS}/metrics")
    assert [f"./figures.py:{script}:ro"] == METRICS["metrics"]["volumes"]
    assert [f"{DEFAULT_METRICS}:{listen.split(':')[1]}"] == METRICS["metrics"]["ports"]
    words = [sys.executable, "-I", str(ROOT / "docker" / "figures.py"), outside]
    with subprocess.Popen([*words, f"http://{address}/metrics"]) as carrier:
        process = start(run_dir, config)
        first_status(process)
        assert health(address) == (0, "")
        assert read_figures(outside).get("irst_frames_total", "published", "") > 0
        assert not answers(f"http://{outside}/"), "nothing but the figures"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        with pytest.raises(urllib.error.HTTPError, match="502"):
            urllib.request.urlopen(f"http://{outside}/metrics", timeout=10)
        carrier.terminate()


def test_strangers_reach_no_container_but_for_the_figures_on_the_hosts_loopback():
    assert {service["network_mode"] for service in COMPOSE.values()} == {"none"}
    assert not any("ports" in service for service in COMPOSE.values())
    assert METRICS["pipeline"] == {"network_mode": "service:metrics"}
    assert all(port.startswith("127.0.0.1:") for port in METRICS["metrics"]["ports"])
    for service in [*COMPOSE.values(), METRICS["metrics"]]:
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

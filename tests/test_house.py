"""What a newcomer meets first: README, ./run, the container files, the commands' help."""

import errno
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.component import available
from pipeline.config import load_config
from pipeline.physics.compiled import compiled_with
from pipeline.runtime.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in SHELL_BLOCKS for line in block.strip().splitlines()]


def test_readme_shows_the_two_commands():
    assert {"./run demo", "./run test"} <= set(COMMANDS)
    assert "./run test" in (ROOT / ".ci" / "run").read_text()


def test_every_other_command_of_the_readme_works(command, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in COMMANDS:
        program, *words = shlex.split(line)
        if program == "./run":
            continue
        words = [str(tmp_path / word) if "/" in word else word for word in words]
        result = command(Path(program).name, *words)
        assert result.returncode == 0, f"{line}\n{result.stderr}"


def test_python_blocks_of_the_readme_name_what_exists():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")
        for module, name in re.findall(r"from (\S+) import (\w+)", block):
            assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("words", [(), ("nonsense",)])
def test_run_without_a_command_says_which_there_are(words):
    result = subprocess.run(["./run", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    for name in ("demo", "test", "check", "bench"):
        assert re.search(rf"^  {name} ", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_scripts_are_sound_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("subscribe.py", "required: endpoint"),
        ("subscribe.py nowhere", "nowhere: Invalid argument"),
        ("send_frames.py tcp://127.0.0.1:5557 many", "invalid int value: 'many'"),
        ("send_frames.py nowhere 1", "nowhere: Invalid argument"),
    ],
)
def test_an_example_says_what_it_wants(words, fragment):
    result = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT / "examples", capture_output=True, text=True
    )
    assert result.returncode == 2
    assert fragment in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("program", ["pipeline", "trainer"])
def test_every_command_has_help(command, program):
    result = command(program, "--help")
    assert result.returncode == 0
    names = re.findall(r"^│ (\w[\w-]*) ", result.stdout, re.MULTILINE)
    assert len(names) >= 4
    app = import_module(f"{program}.cli").app
    for name in names:  # in this process, as starting one for each takes a minute on a busy machine
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output


def test_every_source_and_stage_can_be_loaded_by_name():
    from pipeline.component import component

    for kind in ("source", "stage"):
        for name in available(kind):
            assert component(kind, name).Config


def dockerfiles():
    return sorted((ROOT / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_images_copy_only_what_exists_and_run_a_valid_configuration(path):
    text = path.read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    config = re.search(r'CMD \["run", "--config", "/etc/irst/(\S+)"\]', text)
    assert config
    load_config(ROOT / "configs" / config.group(1))


def test_compose_joins_pipeline_and_subscriber_by_one_socket():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert services["pipeline"]["command"][:2] == ["run", "--config"]
    config = load_config(ROOT / "configs" / Path(services["pipeline"]["command"][2]).name)
    assert services["subscriber"]["command"][:2] == ["subscribe", config.publish.endpoint]
    folder = str(Path(config.publish.endpoint.removeprefix("ipc://")).parent)
    for service in services.values():
        assert any(volume.endswith(f":{folder}") for volume in service["volumes"])


def test_the_service_runs_a_valid_configuration_and_never_retries_a_wrong_one():
    unit = (ROOT / "deploy" / "irst-pipeline@.service").read_text()
    config = ROOT / "configs" / "service.yaml"
    assert load_config(config).publish.endpoint.startswith("ipc:///run/irst/")
    (words,) = re.findall(r"^ExecStart=/opt/irst/bin/pipeline (.*)$", unit, re.MULTILINE)
    assert words == "run --config /etc/irst/%i.yaml"
    assert "ExecStartPre" not in unit, "what it finds missing would not be tried again as wanted"
    for line in ("Restart=on-failure", "RestartPreventExitStatus=2", "StartLimitIntervalSec=0"):
        assert f"\n{line}\n" in unit
    for line in ("Type=notify", "WatchdogSec=10", "Wants=network-online.target"):
        assert f"\n{line}\n" in unit
    (after,) = re.findall(r"^After=(.*)$", unit, re.MULTILINE)
    assert "network-online.target" in after.split()
    assert "RuntimeDirectory=irst\n" in unit
    assert "StateDirectory=irst\n" in unit
    assert "CacheDirectory=irst\n" in unit and "NUMBA_CACHE_DIR=/var/cache/irst/" in unit
    assert str(load_config(config).dead_letters.folder).startswith("/var/lib/irst/")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_can_read_the_service(tmp_path):
    unit = (ROOT / "deploy" / "irst-pipeline@.service").read_text()
    program = f"ExecStart={sys.executable} "  # it looks whether the program is there
    file = tmp_path / "irst-pipeline@service.service"
    file.write_text(re.sub(r"^ExecStart=\S+ ", program, unit, flags=re.MULTILINE))
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert file.name not in result.stderr, result.stderr


def test_containers_that_are_read_only_have_a_place_for_what_is_compiled():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert compose["services"]["pipeline"]["tmpfs"][0].startswith("/tmp:")
    for kind in ("cpu", "gpu"):
        text = (ROOT / "docker" / f"Dockerfile.{kind}").read_text()
        assert "NUMBA_CACHE_DIR=/tmp/numba\n" in text


def test_without_such_a_place_each_process_compiles_for_itself():
    loop = "from pipeline.physics.patch_model import log_cdf; print(log_cdf(0.0))"
    result = subprocess.run(
        [sys.executable, "-c", loop],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(math.log(0.5))


def test_operations_tells_of_every_metric_and_its_commands_work(command, tmp_path):
    text = (ROOT / "docs" / "operations.md").read_text()
    for family in Telemetry().registry.collect():
        name = family.name.removeprefix("irst_")
        assert f"`{name}" in text or f"{name}_total" in text, name
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.strip().splitlines():
            program, *words = shlex.split(line)
            words = [str(tmp_path / word) if "/" in word else word for word in words]
            result = command(program, *words)
            assert result.returncode == 0, f"{line}\n{result.stderr}"


def test_where_the_cache_of_compiled_loops_is_full_they_are_compiled_all_the_same(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.Cache.save_overload", full)
    loop = compiled_with()(lambda value: value + 1)
    assert loop(1) == 2

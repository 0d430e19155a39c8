"""Nobody is let in without a key on the list; real sockets, real processes."""

import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import zmq
from conftest import assert_one_line_error

from pipeline.config import load_config
from pipeline.errors import PipelineError, Unavailable
from pipeline.transport.publish import Publisher, SubscriberSocket
from pipeline.transport.security import ClientKeys, ServerKeys, make_keys

ADDRESS = "tcp://127.0.0.2"


@pytest.fixture
def keys(tmp_path):
    make_keys(tmp_path / "keys", "tracker")
    return tmp_path / "keys"


IPV6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")


@IPV6
@pytest.mark.parametrize("address", ["[::1]", "[::]"])
def test_a_client_on_the_list_gets_the_stream_over_ipv6(keys, address):
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    settings = {"endpoint": f"tcp://{address}:{port}", "keys": str(keys / "server")}
    endpoint = load_config(None, publish=settings).publish.endpoint
    publisher = Publisher(
        [endpoint], "roof", 10, lossless=False, keys=ServerKeys.load(keys / "server")
    )
    client = ClientKeys.load(keys / "tracker")
    subscriber = SubscriberSocket(f"tcp://[::1]:{port}", keys=client)
    assert gets_anything(publisher, subscriber, 10.0)
    subscriber.close()
    publisher.close()


@IPV6
def test_loopback_is_open_over_ipv6_too():
    assert load_config(None, publish={"endpoint": "tcp://[::1]:5556"}).publish.keys is None
    publisher = Publisher(["tcp://[::1]:*"], "roof", 10, lossless=False)
    subscriber = SubscriberSocket(endpoint_of(publisher))
    assert gets_anything(publisher, subscriber, 10.0)
    subscriber.close()
    publisher.close()


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:5556", "tcp://[2001:db8::1]:5556"])
def test_an_address_this_machine_does_not_have_may_come_yet(keys, endpoint):
    server = ServerKeys.load(keys / "server")
    with pytest.raises(Unavailable, match="this machine has no such address now"):
        Publisher([endpoint], "roof", 10, lossless=False, keys=server)


def test_names_are_those_of_this_machine():
    Publisher(["tcp://localhost:*"], "roof", 10, lossless=False).close()
    with pytest.raises(Unavailable, match="this machine has no such address now"):
        Publisher(["tcp://no-such-host:*"], "roof", 10, lossless=False)


@pytest.fixture
def publisher(keys):
    publisher = Publisher(
        [f"{ADDRESS}:*"], "roof", 10, lossless=False, keys=ServerKeys.load(keys / "server")
    )
    yield publisher
    publisher.close()


def endpoint_of(publisher):
    return publisher._socket.last_endpoint.decode()


def gets_anything(publisher, subscriber, seconds=1.0):
    until = time.monotonic() + seconds
    number, took_s = 0, []
    while time.monotonic() < until:
        number += 1
        began = time.monotonic()
        publisher.publish({"n": number}, lambda: None)
        took_s.append(time.monotonic() - began)
        if subscriber.receive(0.02) is not None:
            return True
    assert median(took_s) < 0.1, "it blocks nobody"
    return False


def assert_gets_nothing(publisher, subscriber):
    """Neither while nobody has refused it yet, nor for a while after that."""
    until = time.monotonic() + 20.0
    while not publisher.refused:
        assert not gets_anything(publisher, subscriber, 0.1)
        assert time.monotonic() < until
    assert not gets_anything(publisher, subscriber)


def test_a_client_on_the_list_gets_the_stream(publisher, keys):
    subscriber = SubscriberSocket(endpoint_of(publisher), keys=ClientKeys.load(keys / "tracker"))
    assert gets_anything(publisher, subscriber, 10.0)
    subscriber.close()


def test_a_client_without_a_key_gets_nothing(publisher):
    subscriber = SubscriberSocket(endpoint_of(publisher))
    assert_gets_nothing(publisher, subscriber)
    assert publisher.subscribers == 0
    subscriber.close()


def test_a_client_that_is_not_on_the_list_gets_nothing(publisher, keys):
    public, secret = zmq.curve_keypair()
    stranger = ClientKeys(public, secret, ClientKeys.load(keys / "tracker").server)
    subscriber = SubscriberSocket(endpoint_of(publisher), keys=stranger)
    assert_gets_nothing(publisher, subscriber)
    subscriber.close()


def test_a_client_that_trusts_another_pipeline_gets_nothing(publisher, keys, tmp_path):
    make_keys(tmp_path / "other", "tracker")
    own = ClientKeys.load(keys / "tracker")
    elsewhere = ClientKeys.load(tmp_path / "other" / "tracker")
    subscriber = SubscriberSocket(
        endpoint_of(publisher), keys=ClientKeys(own.public, own.secret, elsewhere.server)
    )
    assert_gets_nothing(publisher, subscriber)
    subscriber.close()


def test_refusals_are_counted_for_the_metrics_and_said_once_a_minute(publisher, keys, caplog):
    good = SubscriberSocket(endpoint_of(publisher), keys=ClientKeys.load(keys / "tracker"))
    assert gets_anything(publisher, good, 10.0)
    assert publisher.refused == 0
    public, secret = zmq.curve_keypair()
    server = ClientKeys.load(keys / "tracker").server
    for _ in range(3):
        stranger = SubscriberSocket(endpoint_of(publisher), keys=ClientKeys(public, secret, server))
        before, until = publisher.refused, time.monotonic() + 20
        while publisher.refused == before:
            publisher.listen(20)
            assert time.monotonic() < until
        stranger.close()
    assert publisher.refused >= 3
    (line,) = caplog.messages
    assert "its key is not on the list" in line
    good.close()


def test_a_plain_socket_gets_nothing_and_harms_nobody(publisher, keys):
    host, port = endpoint_of(publisher).removeprefix("tcp://").split(":")
    good = SubscriberSocket(endpoint_of(publisher), keys=ClientKeys.load(keys / "tracker"))
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        plain.settimeout(0.5)
        assert gets_anything(publisher, good, 10.0)
        received = b""
        try:
            while chunk := plain.recv(4096):
                received += chunk
        except OSError:
            pass
        assert b"irst" not in received and len(received) < 1000
    good.close()


BULLY = """
import os, sys, time, zmq
socket = zmq.Context().socket(zmq.XSUB)
socket.connect(sys.argv[1])
socket.send(b"\\x01targets." + b"x" * 10_000_000)
time.sleep(1.5)
os._exit(0)  # its own libzmq could not take such a topic down again
"""


def test_a_topic_of_megabytes_is_refused(tmp_path):
    endpoint = f"ipc://{tmp_path}/out"
    publisher = Publisher([endpoint], "roof", 10, lossless=False)
    bully = subprocess.Popen([sys.executable, "-c", BULLY, endpoint])
    good = SubscriberSocket(endpoint)
    while bully.poll() is None:
        publisher.listen(50)
    assert bully.returncode == 0
    assert gets_anything(publisher, good)
    assert publisher.subscribers == 1
    good.close()
    publisher.close()


def test_keys_are_their_owners_alone(keys):
    for path in keys.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert not list((keys / "tracker").glob("server.key_secret"))


def test_each_client_has_keys_of_its_own_and_they_are_never_overwritten(keys):
    before = (keys / "server" / "server.key_secret").read_text()
    make_keys(keys, "display")
    assert (keys / "server" / "server.key_secret").read_text() == before
    assert ClientKeys.load(keys / "display").public != ClientKeys.load(keys / "tracker").public
    with pytest.raises(PipelineError, match="exists already"):
        make_keys(keys, "display")


@pytest.mark.parametrize("name", ["", "../up", "server", "a b", "x" * 65])
def test_a_client_needs_a_plain_name(tmp_path, name):
    with pytest.raises(PipelineError, match="--client"):
        make_keys(tmp_path, name)


def test_a_secret_that_others_can_read_is_refused(keys):
    (keys / "server" / "server.key_secret").chmod(0o644)
    with pytest.raises(PipelineError, match="chmod 600"):
        ServerKeys.load(keys / "server")


@pytest.mark.parametrize("where", ["", "clients", "clients/tracker.key"])
def test_a_list_that_others_can_write_is_refused(keys, where):
    path = keys / "server" / where
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(PipelineError, match=f"{path}: others can write .*chmod go-w"):
        ServerKeys.load(keys / "server")


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_keys_that_cannot_be_made_leave_nothing(keys, tmp_path):
    secret = keys / "server" / "server.key_secret"
    secret.chmod(0o644)
    before = tree(keys)
    with pytest.raises(PipelineError, match=f"chmod 600 {secret}"):
        make_keys(keys, "display")
    assert tree(keys) == before
    secret.chmod(0o600)
    make_keys(keys, "display")
    (keys / "tracker").rename(tmp_path / "at the client")
    before = tree(keys)
    with pytest.raises(PipelineError, match=r"tracker\.key: exists already"):
        make_keys(keys, "tracker")
    assert tree(keys) == before


@pytest.mark.parametrize("text", ["", "nonsense", 'public-key = "short"\nsecret-key = "x"\n'])
def test_a_damaged_key_is_named(keys, text):
    (keys / "tracker" / "client.key_secret").write_text(text)
    with pytest.raises(PipelineError, match=r"client\.key_secret"):
        ClientKeys.load(keys / "tracker")


@pytest.mark.parametrize("where", ["/proc/x", "a file"])
def test_where_keys_cannot_be_put_is_named_with_what_to_do(tmp_path, where):
    (tmp_path / "a file").touch()
    with pytest.raises(PipelineError, match=rf"{where}: keys cannot be put there .*choose another"):
        make_keys(tmp_path / where, "tracker")


def test_without_a_client_on_the_list_nothing_starts(keys):
    (keys / "server" / "clients" / "tracker.key").unlink()
    with pytest.raises(PipelineError, match="no client is allowed"):
        ServerKeys.load(keys / "server")


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5556", "tcp://*:5556", "tcp://[::]:5556", "tcp://irst-1.local:5556"]
)
def test_beyond_this_machine_only_with_keys(tmp_path, keys, endpoint):
    file = tmp_path / "config.yaml"
    file.write_text(f"publish: {{endpoint: '{endpoint}'}}")
    with pytest.raises(PipelineError, match=r"pipeline keys DIR"):
        load_config(file)
    file.write_text(f"publish: {{endpoint: '{endpoint}', keys: {keys / 'server'}}}")
    assert load_config(file).publish.endpoint == endpoint


def test_metrics_never_leave_the_machine(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("telemetry: {metrics: '0.0.0.0:9464'}")
    with pytest.raises(PipelineError, match=r"telemetry\.metrics: .*127\.0\.0\.1"):
        load_config(file)


def test_the_keys_command_says_where_each_goes(command, tmp_path):
    result = command("pipeline", "keys", tmp_path / "keys", "--client", "tracker")
    assert result.returncode == 0, result.stderr
    assert "server" in result.stdout and "tracker" in result.stdout
    again = command("pipeline", "keys", tmp_path / "keys", "--client", "tracker")
    assert_one_line_error(again, "exists already")

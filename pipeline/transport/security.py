"""Who is let in from beyond this machine: CURVE keys, and the list of clients that may subscribe.

`pipeline keys DIR` makes a folder for the pipeline and one for each client:

DIR/server/server.key_secret            stays with the pipeline, mode 0600
DIR/server/clients/NAME.key             a client that is let in; delete the file to lock it out
DIR/NAME/client.key_secret, server.key  goes to the client, mode 0600

The files are those of `zmq.auth` (ZPL), so any language's ZeroMQ reads them. See RFC 26/ZMTP-CURVE.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from pipeline.errors import PipelineError

CLIENT_NAME = r"[A-Za-z0-9_-]{1,64}"
DOMAIN = "irst"


@dataclass(frozen=True)
class ServerKeys:
    """The pipeline's key pair, and the folder of the public keys it lets in."""

    public: bytes
    secret: bytes
    clients: Path

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read DIR/server; raises PipelineError if a key is missing, damaged or open to others."""
        public, secret = _read_pair(folder / "server.key_secret")
        clients = folder / "clients"
        if not list(clients.glob("*.key")):
            raise PipelineError(
                f"{clients}: no client is allowed; make one with `pipeline keys {folder.parent} "
                "--client NAME`"
            )
        for path in clients.glob("*.key"):
            _read(path)
        for path in (folder, clients, *clients.glob("*.key")):
            if path.stat().st_mode & 0o022:
                raise PipelineError(
                    f"{path}: others can write it, and so let in whom they like; run chmod go-w "
                    f"{path}"
                )
        return cls(public, secret, clients)

    @contextmanager
    def admitting(self) -> Iterator[None]:
        """Check every client that connects against the list, for as long as the block lasts."""
        authenticator = ThreadAuthenticator(zmq.Context.instance())
        authenticator.start()
        try:
            authenticator.configure_curve(domain=DOMAIN, location=str(self.clients))
            yield
        finally:
            authenticator.stop()

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Let nobody in to this socket without a key on the list."""
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SERVER, 1)


@dataclass(frozen=True)
class ClientKeys:
    """A client's key pair, and the public key of the pipeline it trusts."""

    public: bytes
    secret: bytes
    server: bytes

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read DIR/NAME; raises PipelineError if a key is missing, damaged or open to others."""
        public, secret = _read_pair(folder / "client.key_secret")
        return cls(public, secret, _read(folder / "server.key")[0])

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Prove who we are, and talk to nobody but that pipeline."""
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)


def make_keys(folder: Path, client: str) -> Path:
    """Make a client's keys, and first the pipeline's if there are none; returns its folder.

    Raises PipelineError if the client has keys already: they are never overwritten.
    """
    if not re.fullmatch(CLIENT_NAME, client) or client == "server":
        raise PipelineError(
            f"--client must be up to 64 letters, digits, _ or -, and not `server`, got {client!r}"
        )
    server, own = folder / "server", folder / client
    for path in (own, server / "clients" / f"{client}.key"):
        if path.exists():
            raise PipelineError(f"{path}: exists already; remove it or choose another client name")
    if (server / "server.key_secret").exists():
        _read_pair(server / "server.key_secret")  # before anything is made
    try:
        for path in (folder, server, server / "clients", own):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (server / "server.key_secret").exists():
            _make_pair(server / "server")
        server_public, _ = _read_pair(server / "server.key_secret")
        _make_pair(own / "client")
        public, _ = _read_pair(own / "client.key_secret")
        (own / "client.key").unlink()
        _write(own / "server.key", _public_file(server_public))
        _write(server / "clients" / f"{client}.key", _public_file(public))
    except OSError as error:
        raise PipelineError(
            f"{error.filename or folder}: keys cannot be put there ({error.strerror}); choose "
            "another folder"
        ) from error
    return own


def _make_pair(stem: Path) -> None:
    public, secret = zmq.curve_keypair()
    _write(stem.with_suffix(".key"), _public_file(public))
    text = f'{_public_file(public)}    secret-key = "{secret.decode()}"\n'
    _write(stem.with_suffix(".key_secret"), text)


def _public_file(public: bytes) -> str:
    return f'metadata\ncurve\n    public-key = "{public.decode()}"\n'


def _write(path: Path, text: str) -> None:
    """Write a new file that is its owner's alone from the first byte."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError, IndexError) as error:
        raise PipelineError(
            f"{path}: not a readable key file ({error}); make one with `pipeline keys`"
        ) from error
    for key in (public, secret):
        if key is not None and not re.fullmatch(rb"[!-~]{40}", key):
            raise PipelineError(f"{path}: damaged key; make new ones with `pipeline keys`")
    return public, secret


def _read_pair(path: Path) -> tuple[bytes, bytes]:
    public, secret = _read(path)
    if secret is None:
        raise PipelineError(f"{path}: holds no secret key; make one with `pipeline keys`")
    if path.stat().st_mode & 0o077:
        raise PipelineError(f"{path}: others can read this secret key; run chmod 600 {path}")
    return public, secret

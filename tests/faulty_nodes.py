"""Nodes with faults, run in place of `run_node`; here so that a spawned process can import them."""

import os
import signal
import time
from pathlib import Path

from msgspec.structs import replace

from pipeline.errors import PipelineError
from pipeline.messages import Dropped, Unmixed
from pipeline.runtime import front, worker
from pipeline.runtime.answers import encoded
from pipeline.runtime.flow import Flow
from pipeline.runtime.node import run_node
from pipeline.stages.detect import Detect
from pipeline.stages.recognise import Recognise
from pipeline.stages.unmix import Unmix
from pipeline.transport.hub import Word

FRAME = 3

CHAOS = "IRST_TEST_CHAOS"
"""Environment: the folder where `on_demand` says who it is and finds what to damage."""
DAMAGE = {
    "header": lambda parts: [b"\xc1", *parts[1:]],
    "short": lambda parts: [*parts[:-1], bytes(parts[-1])[:-1]],
    "fewer": lambda parts: parts[:-1],
    "more": lambda parts: [*parts, b"more"],
}

INHERITED = False
"""Set by a test: what it is in a process tells whether that has its parent's memory."""

SENT_S = 0.3
"""By then ZeroMQ's thread has sent what it was given: a killed process takes it along."""


def numbers(batch):
    """Of the frames that are done at once."""
    return [work.message.info.seq for work in batch]


def babbling(task):
    """The unmix node answers one frame, whenever it meets it, with what is no word."""
    whole = worker.send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            socket._socket.send(b"no word at all")
            return True
        return whole(socket, message, trace)

    worker.send = send
    run_node(task)


def corrupting(task):
    """The unmix node sends parts of a message that make none."""
    whole = worker.send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            socket.send(Word("result", FRAME), [b"no header", b"no array"])
            return True
        return whole(socket, message, trace)

    worker.send = send
    run_node(task)


def dying(task):
    """The unmix node dies on one frame, whenever it meets it; its earlier answers are sent."""
    whole = Flow.process_all

    def process_all(self, batch):
        if task.node.name == "unmix" and FRAME in numbers(batch):
            time.sleep(SENT_S)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch)

    Flow.process_all = process_all
    run_node(task)


def dying_once(task):
    """The first unmix node dies in the middle of its work; those after it do not."""
    (dying if task.identity.endswith(b".1") else run_node)(task)


def hanging_once(task):
    """The first unmix node stops answering, and says that it is alive no more."""
    whole = Flow.process_all

    def process_all(self, batch):
        if task.node.name == "unmix" and FRAME in numbers(batch):
            time.sleep(600)
        return whole(self, batch)

    if task.identity.endswith(b".1"):
        Flow.process_all = process_all
    run_node(task)


def lying(task):
    """The unmix node answers with the number of another frame inside."""
    whole = worker.send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            info = replace(message.info, seq=FRAME + 1)
            if isinstance(message, Unmixed):
                other = replace(message, patches=replace(message.patches, info=info))
            else:
                other = replace(message, info=info)
            socket.send(Word("result", FRAME), encoded(other, trace))
            return True
        return whole(socket, message, trace)

    worker.send = send
    run_node(task)


def stumbling(task):
    """The front can do no frame of an odd number."""
    whole = Detect.process

    def process(self, message):
        if message.info.seq % 2:
            raise PipelineError("odd")
        return whole(self, message)

    Detect.process = process
    run_node(task)


def as_its_engine_is_called(task):
    """An unmix node with the engine `slow` takes 400 ms more, with `failing` it can do no frame."""
    whole, name = Unmix.process, Path(task.config.engine).stem

    def process(self, message):
        if name == "slow":
            time.sleep(0.4)
        elif name == "failing":
            raise PipelineError("cannot")
        return whole(self, message)

    Unmix.process = process
    run_node(task)


def as_its_detector_is_called(task):
    """A node beside with the detector `slow` takes 400 ms more, with `failing` it says nothing."""
    whole = Recognise.process
    copy = Path(task.config.stages["recognise"].engine)
    name = Path(task.originals[str(copy.parent)]).name

    def process(self, message):
        if name == "slow":
            time.sleep(0.4)
        elif name == "failing":
            raise PipelineError("no idea")
        return whole(self, message)

    Recognise.process = process
    run_node(task)


def dying_beside(task):
    """The node beside the flow dies on one frame, whenever it meets it."""
    whole = Flow.process_all

    def process_all(self, batch):
        if task.node.beside and FRAME in numbers(batch):
            time.sleep(SENT_S)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch)

    Flow.process_all = process_all
    run_node(task)


def mute_once(task):
    """The first unmix node says that it is alive, and never what became of one frame."""
    whole = worker.send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            return True
        return whole(socket, message, trace)

    if task.identity.endswith(b".1"):
        worker.send = send
    run_node(task)


def on_demand(task):
    """Says which process it is; damages its next answer in the way a file asks for, or babbles."""
    folder = Path(os.environ[CHAOS])
    (folder / f"{task.identity.decode()}.pid").write_text(str(os.getpid()))
    wish = folder / f"{task.node.name}.damage"
    whole = worker.send

    def send(socket, message, trace):
        if isinstance(message, Dropped) or not wish.exists():
            return whole(socket, message, trace)
        try:
            kind = wish.read_text()
            wish.unlink()
        except FileNotFoundError:  # another replica was quicker
            return whole(socket, message, trace)
        if kind == "word":
            socket._socket.send(b"no word at all")
        else:
            parts = DAMAGE[kind](encoded(message, trace))
            socket.send(Word("result", message.info.seq, t_ns=trace.t_ingest_ns), parts)
        return True

    front.send = worker.send = send
    run_node(task)


def spawned(task):
    """Runs only in a process that has nothing of its parent's memory: no sockets, no locks."""
    assert not INHERITED, "this process was forked"
    run_node(task)

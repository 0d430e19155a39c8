"""Nodes with faults, run in place of `run_node`; here so that a spawned process can import them."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.messages import Unmixed
from pipeline.runtime import node
from pipeline.runtime.flow import Flow
from pipeline.stages.detect import Detect
from pipeline.stages.recognise import Recognise
from pipeline.stages.unmix import Unmix

FRAME = 3

SENT_S = 0.3
"""By then ZeroMQ's thread has sent what it was given: a killed process takes it along."""


def babbling(task):
    """The unmix node answers one frame, whenever it meets it, with what is no word."""
    whole = node._send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            socket._socket.send(b"no word at all")
            return True
        return whole(socket, message, trace)

    node._send = send
    node.run_node(task)


def corrupting(task):
    """The unmix node sends parts of a message that make none."""
    whole = node._send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            socket.send(node.Word("result", FRAME), [b"no header", b"no array"])
            return True
        return whole(socket, message, trace)

    node._send = send
    node.run_node(task)


def dying(task):
    """The unmix node dies on one frame, whenever it meets it; its earlier answers are sent."""
    whole = Flow.process

    def process(self, message, trace, beside=None):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            time.sleep(SENT_S)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, message, trace, beside)

    Flow.process = process
    node.run_node(task)


def dying_once(task):
    """The first unmix node dies in the middle of its work; those after it do not."""
    (dying if task.identity.endswith(b".1") else node.run_node)(task)


def hanging_once(task):
    """The first unmix node stops answering, and says that it is alive no more."""
    whole = Flow.process

    def process(self, message, trace, beside=None):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            time.sleep(600)
        return whole(self, message, trace, beside)

    if task.identity.endswith(b".1"):
        Flow.process = process
    node.run_node(task)


def lying(task):
    """The unmix node answers with the number of another frame inside."""
    whole = node._send

    def send(socket, message, trace):
        if task.node.name == "unmix" and message.info.seq == FRAME:
            info = replace(message.info, seq=FRAME + 1)
            if isinstance(message, Unmixed):
                other = replace(message, patches=replace(message.patches, info=info))
            else:
                other = replace(message, info=info)
            socket.send(node.Word("result", FRAME), node._encoded(other, trace))
            return True
        return whole(socket, message, trace)

    node._send = send
    node.run_node(task)


def stumbling(task):
    """The front can do no frame of an odd number."""
    whole = Detect.process

    def process(self, message):
        if message.info.seq % 2:
            raise PipelineError("odd")
        return whole(self, message)

    Detect.process = process
    node.run_node(task)


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
    node.run_node(task)


def as_its_detector_is_called(task):
    """A node beside with the detector `slow` takes 200 ms more, with `failing` it says nothing."""
    whole = Recognise.process
    name = Path(task.config.stages["recognise"].engine).parent.name

    def process(self, message):
        if name == "slow":
            time.sleep(0.2)
        elif name == "failing":
            raise PipelineError("no idea")
        return whole(self, message)

    Recognise.process = process
    node.run_node(task)


def dying_beside(task):
    """The node beside the flow dies on one frame, whenever it meets it."""
    whole = Flow.process

    def process(self, message, trace, beside=None):
        if task.node.beside and message.info.seq == FRAME:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, message, trace, beside)

    Flow.process = process
    node.run_node(task)

"""A node: a process that runs its stages on what the supervisor gives it.

The front reads the source and sends what comes of its frames; every other node answers one frame
after another. All it holds may be lost with it: the supervisor's ledger knows what that was.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import threading
import time

import cv2

from engines.errors import EngineError
from pipeline.errors import PipelineError
from pipeline.runtime.answers import tell_failure
from pipeline.runtime.flow import Flow, build_flow, shown_to_beside
from pipeline.runtime.front import run_front
from pipeline.runtime.logs import configure_logs
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.rehearsal import rehearse
from pipeline.runtime.task import NodeTask, hub_endpoint
from pipeline.runtime.worker import run_worker
from pipeline.transport import sockets
from pipeline.transport.hub import NodeSocket

ORPHAN_CHECK_S = 0.5
LESS_URGENT = 10
PR_SET_PDEATHSIG = 1  # linux/prctl.h
log = logging.getLogger(__name__)


def run_node(task: NodeTask) -> None:
    """Run one node until it is told to stop; the entry point of its process.

    Signals are the supervisor's affair: the node is started with them blocked, and ends by itself
    when its supervisor is gone.
    """
    configure_logs(task.config.telemetry)
    keep_freed_memory()
    cv2.setNumThreads(1)  # the other cores are the other nodes'
    if task.node.cores is not None:
        os.sched_setaffinity(0, task.node.cores)
    if task.node.beside:
        os.nice(LESS_URGENT)  # where cores are short, the flow goes first
    # A stopped process would not notice that its supervisor is gone: its death continues it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(target=_outlive_not, args=(task,), daemon=True).start()
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    socket = NodeSocket(hub_endpoint(task.run_dir), task.identity, wake)
    stages = task.node.stages
    cut = shown_to_beside(stages) if task.row == 0 and task.config.beside else 0
    try:
        first, flow = (
            build_flow(task.config, part, task.sensor, task.shape)
            for part in (stages[:cut], stages[cut:])
        )
        with contextlib.closing(first), contextlib.closing(flow):
            if task.mode == "live":
                _rehearse(task, flow)
            if task.row == 0:
                run_front(task, first, flow, socket, wake)
            else:
                run_worker(task, flow, socket)
    except Exception as error:
        log.debug("node %s", task.node.name, exc_info=True)
        fatal = isinstance(error, PipelineError | EngineError)
        tell_failure(socket, error, task.originals, fatal=fatal)
    finally:
        socket.close()
        sockets.end()


def _rehearse(task: NodeTask, flow: Flow) -> None:
    """In the front with stages of its own: a detector may remember the frames it has seen."""
    if task.row > 0:
        rehearse(flow, task.node.stages, task.sensor, task.shape)
        return
    again = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    with contextlib.closing(again):
        rehearse(again, task.node.stages, task.sensor, task.shape)


def _outlive_not(task: NodeTask) -> None:
    """End this process when its supervisor is gone, whatever it is waiting for."""
    while os.getppid() == task.supervisor_pid:
        time.sleep(ORPHAN_CHECK_S)
    shutil.rmtree(task.run_dir, ignore_errors=True)
    sockets.remove_stale(task.config.publish.endpoint or "")
    for endpoint in task.config.front_endpoints:
        sockets.remove_stale(endpoint, ours=task.row == 0)
    os._exit(1)

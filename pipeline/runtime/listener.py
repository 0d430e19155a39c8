"""What nodes say to the supervisor, and strangers: the ledger, the children and dead letters learn.

Everything a node says counts as a sign of life; what it says of a frame counts only if it comes
from the process the ledger names.
"""

import time
from typing import Any

from pipeline.errors import PipelineError
from pipeline.runtime.children import Child, Children
from pipeline.runtime.dead_letters import DeadLetters
from pipeline.runtime.dispatch import Dispatcher
from pipeline.runtime.join import Join
from pipeline.runtime.swap import Reloader
from pipeline.transport import codec
from pipeline.transport.hub import FROM_NODE, HubSocket, Word, read_word


class NodeFailure(PipelineError):
    """A node said why it could not go on; its own exit code is kept."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class Listener:
    """Acts on what comes in at the hub.

    started: what a node fails for from then on may pass, and is not what the run was given.
    failure: why the source cannot go on; the frames before it are still done.
    """

    def __init__(
        self,
        hub: HubSocket,
        children: Children,
        dispatcher: Dispatcher,
        reloader: Reloader,
        dead_letters: DeadLetters,
    ) -> None:
        self._hub, self._children, self._dispatcher = hub, children, dispatcher
        self._reloader, self._dead_letters = reloader, dead_letters
        self.started = False
        self.failure: NodeFailure | None = None

    def hear(self, identity: bytes, parts: list[Any]) -> None:
        """Act on one message; raises NodeFailure if the run cannot go on without who says it."""
        child = self._children.find(identity)
        tried = self._reloader.find(identity)
        speaker = child or tried
        if speaker is None:
            if not self._children.knew(identity):  # else of a process that is dead
                cause = f"from a stranger, {identity[:40]!r}"
                self._dead_letters.keep(parts, cause, "word")
            return
        speaker.heard_s = time.monotonic()
        try:
            word = read_word(parts[0] if parts else b"", FROM_NODE)
        except codec.CodecError as error:
            self._dead_letters.keep(parts, f"from node {speaker.name}: {error}", "word")
            speaker.last_words = f"it said what is no word ({error})"
            if speaker.process is not None:
                speaker.process.kill()  # what else it would say cannot be relied on
            return
        if child is None:
            self._reloader.hear(speaker, word, parts[1:])
        elif word.kind == "ready":
            self._is_ready(child)
        elif word.kind in ("faulted", "failed"):
            child.last_words = word.text
            if word.kind == "failed" and child not in self._children.retired:
                self._has_failed(child, word)
        elif child.row == 0:
            self._hear_front(child, word, parts[1:])
        else:
            self._hear_worker(identity, word, parts[1:])

    def _is_ready(self, child: Child) -> None:
        child.ready = True
        if child in self._children.retired:  # it was starting when others took over
            self._hub.send(child.identity, Word("stop"))
        elif child.row > 0:
            self._dispatcher.ready(child.identity, child.row)
        else:
            self._dispatcher.front_is_new()

    def _has_failed(self, child: Child, word: Word) -> None:
        """A node cannot be had: a run does not start so; in one that has, it is started again.

        A source that cannot go on ends the run.
        """
        is_source = child.row == 0 and child.ready
        if is_source or not self.started:
            self.failure = NodeFailure(word.text, word.code)
            if not is_source:
                raise self.failure

    def _hear_front(self, child: Child, word: Word, parts: list[Any]) -> None:
        if word.kind == "result":
            self._dispatcher.take(word.seq, word.t_ns, parts)
            self._reloader.offer(word.seq, word.t_ns, parts)
        elif word.kind == "frame" and isinstance(self._dispatcher, Join):
            self._dispatcher.show(word.seq, word.t_ns, parts)
            self._reloader.show(word.seq, word.t_ns, parts)
        elif word.kind == "malformed":
            cause = f"frame {word.seq} from the source: {word.text}"
            self._dead_letters.keep(parts, cause, "frame", count=word.end - word.seq)
            self._dispatcher.lose(word.seq, word.end, word.stage, word.text)
        elif word.kind == "lost":
            self._dispatcher.lose(word.seq, word.end, word.stage, word.text)
        elif word.kind == "end":
            child.done = True
            self._dispatcher.end(word.seq)

    def _hear_worker(self, identity: bytes, word: Word, parts: list[Any]) -> None:
        if word.kind not in ("result", "lost", "malformed"):
            return
        job = self._dispatcher.answer(identity, word.seq)
        if job is None:
            return
        if word.kind == "result":
            self._dispatcher.forward(job, parts)
        elif word.kind == "lost":
            self._dispatcher.give_up(job, word.text, word.stage)
        else:
            node = self._dispatcher.node_of(job)
            self._dead_letters.keep(job.parts, f"frame {job.seq} at node {node}: {word.text}")
            self._dispatcher.give_up(job, f"malformed message: {word.text}"[:200], "transport")

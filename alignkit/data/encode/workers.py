"""Encode rows in several processes, with the examples, counts and errors that one would give."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, Self

from alignkit.batch import Example
from alignkit.data.encode.chunks import ahead, chunks
from alignkit.data.read.rows import Row, Rows
from alignkit.data.text.defects import Judge
from alignkit.data.text.policies import Policies, Tally
from alignkit.errors import AlignkitError
from alignkit.utils.interrupts import ignore_signals

_ROWS = 256
_SIGNAL_SECONDS = 1.0  # for a signal that ended a process to reach this one too


class Encoded(NamedTuple):
    """Hold one row's example, as it travels from the process that made it.

    Example:
        >>> Encoded(3, Example([8, 9], [[4, 0]])).line
        3

    Attributes:
        line: The row's line in its source.
        example: Its ids; of a document one response, which packing may cut.
        key: What its prompt or document is known by, see `Judge.key`.
        system: Its system message, an empty one for none.
        violation: What to show of a failed boundary proof; empty where it held.
    """

    line: int
    example: Example
    key: bytes = b""
    system: str = ""
    violation: str = ""


class ChunkEncoder(Protocol):
    """Turn any rows of a source into examples, whatever other rows there are."""

    policies: Policies

    def encoded(self, rows: Rows, judge: Judge) -> Iterator[Encoded]:
        """Yield the examples of the rows, in order; ``judge`` counts and applies the policies."""


class _Chunk(NamedTuple):
    """Hold what a process makes of some rows: examples, counts, and the error that ended it."""

    encoded: list[Encoded]
    tally: Tally
    error: Exception | None


@dataclass(frozen=True)
class _Worker:
    """Hold a process and the pipe to it."""

    process: BaseProcess
    pipe: Connection


class Workers:
    """Encode rows in processes of its own, which start with the first rows and end with the block.

    Each holds one chunk of rows at a time and gets the next in turn, so that nothing grows with
    the file, and results come in the order of the rows.

    Args:
        encoder: What the processes get a copy of.
        count: How many processes.
    """

    def __init__(self, encoder: ChunkEncoder, count: int) -> None:
        self._encoder = encoder
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def encoded(self, rows: Rows, judge: Judge) -> Iterator[Encoded]:
        """Yield what the encoder's own ``encoded`` would, with the same counts in ``judge``.

        Raises:
            AlignkitError: What the encoder raised; or a process died, or cannot be started.
        """
        if not self._workers:
            self._start()
        turn = 0

        def begin(chunk: list[tuple[int, Row]]) -> Callable[[], _Chunk]:
            nonlocal turn
            worker = self._workers[turn % self._count]
            turn += 1
            self._talk(worker, judge.source, lambda: worker.pipe.send((judge.source, chunk)))
            return lambda: self._talk(worker, judge.source, worker.pipe.recv)

        for done in ahead(begin, chunks(rows, _ROWS), most=self._count):
            judge.tally.merge(done.tally)
            yield from done.encoded
            if done.error is not None:
                raise done.error

    def _start(self) -> None:
        try:
            encoder = pickle.dumps(self._encoder)
        except Exception as error:  # a user's reader may hold anything
            raise AlignkitError(
                f"data.num_proc={self._count}: the encoder cannot be sent to another process "
                f"({error}); define what it uses at the top of a module, or set data.num_proc to 1"
            ) from error
        # A forked process would inherit threads' locks, of tokenizers and of torch.
        spawn = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, encoder), daemon=True)
            process.start()
            there.close()  # so that the pipe ends with the process
            self._workers.append(_Worker(process, here))

    def _talk(self, worker: _Worker, source: str, talk: Callable[[], Any]) -> Any:
        """Return what it gives to send to a process or to receive from it.

        Raises:
            AlignkitError: It has died.
        """
        try:
            return talk()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        worker.process.join()
        status = worker.process.exitcode or 0
        if status == -signal.SIGTERM:
            time.sleep(_SIGNAL_SECONDS)  # this one's own handler ends the command
        told = f"{source}: a process that encodes it"
        if status < 0:
            raise AlignkitError(
                f"{told} was killed by signal {-status}; if memory ran out, lower data.num_proc"
            )
        raise AlignkitError(
            f"{told} ended with status {status}; set data.num_proc to 1, or, in a script, start "
            "the work below `if __name__ == '__main__':`"
        )


@contextmanager
def workers_for(encoder: Any, count: int) -> Iterator[Workers | None]:
    """Give ``count`` processes to encode in, and none where one is enough.

    Raises:
        AlignkitError: The encoder is a user's own that does not share its work.
    """
    if count == 1:
        yield None
        return
    if "workers" not in signature(encoder.write).parameters:
        raise AlignkitError(
            f"data.num_proc={count}: {type(encoder).__qualname__}.write takes no `workers`, so it "
            "encodes in one process; set data.num_proc to 1"
        )
    with Workers(encoder, count) as workers:
        yield workers


def _serve(pipe: Connection, pickled: bytes) -> None:
    """Encode chunks until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: there are as many processes
    ignore_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which Python ends daemons
    encoder: ChunkEncoder | None = None
    try:
        while True:
            source, rows = pipe.recv()
            encoder = encoder or pickle.loads(pickled)
            pipe.send(_encode(encoder, source, rows))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the process that reads it has ended, or asks for no more


def _encode(encoder: ChunkEncoder, source: str, rows: list[tuple[int, Row]]) -> _Chunk:
    tally = Tally()
    encoded: list[Encoded] = []
    try:
        for each in encoder.encoded(iter(rows), Judge(source, encoder.policies, tally)):
            encoded.append(each)
    except Exception as error:
        if not isinstance(error, AlignkitError):  # whose message is all there is to say
            error.add_note(traceback.format_exc())
        return _Chunk(encoded, tally, error)
    return _Chunk(encoded, tally, None)

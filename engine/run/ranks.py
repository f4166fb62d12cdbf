"""One command as several processes: rank 0 runs it, and the others do what it asks of them.

    torchrun --nproc-per-node=4 -m engine.evolve --flops 300M
    torchrun --nproc-per-node=4 -m -- engine.evolve --flops 300M --run RUN
    torchrun --nproc-per-node=4 -m engine.metatrain

Without ``--`` torchrun takes ``--run`` for the beginning of an option of its own.

Rank 0 alone reads the command line, writes files and prints. The others begin when it has checked its input (`begin`),
answer what it sends, and end with it: with its exit status when it ends in order, else as soon as their connections
to it close. A rank that dies shows on rank 0 in the same way.

Besides sending messages (`engine.run.messages`) all ranks can do something at the same time (`together`).
"""

from __future__ import annotations

import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from engine.errors import RankError, UserError
from engine.run import torchrun
from engine.run.messages import announce, connect, hear, receive, rendezvous, send
from kernels.backends import BackendError

# Seconds that rank 0 may take over its step when it is to end: torchrun kills after 30.
GRACE = 20
# Seconds within which the end of a rank shows in its connections.
NOTICE = 0.2

SAVED_ALL = "everything done so far is saved: the same command with --resume goes on, on any number of ranks"

# What another rank does with the options of the command: take in work, give answers.
Assist = Callable[[Any, Callable[[], Any], Callable[[Any], None]], None]


@dataclass(frozen=True)
class Failure:
    """What went wrong on another rank, and the exit status it asks for; maybe ``of_all`` ranks, and each may say it."""

    status: int
    reason: str
    traceback: str
    of_all: bool = False


def launch(command: Callable[[], int], assist: Assist) -> int:
    """Run ``command`` on rank 0 and ``assist(options, next_work, answer)`` on the others.

    Returns the exit status in a single process; one of several ends here.
    """
    if torchrun.count() == 1:
        return command()
    if torchrun.number():
        _follow(assist)
    global _leader
    _leader = Leader(*rendezvous())
    signal.signal(signal.SIGTERM, _terminated)
    status = 1
    try:
        status = command()
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    _leader.end(status)
    return _exit(status)


def begin(options: Any, device: torch.device) -> None:
    """Let the other ranks begin, if there are any. Rank 0 calls it when all that is quick to check was checked."""
    if _leader:
        _leader.begin(options, device)


def tell(what: Any) -> None:
    """Send something to all other ranks, if there are any."""
    for rank in range(1, torchrun.count()):
        assert _leader
        _leader.send(rank, what)


def answers() -> Iterator[tuple[int, Any]]:
    """One answer of every other rank, as they come in."""
    for _ in range(1, torchrun.count()):
        assert _leader
        yield _leader.answer()


def leader() -> Leader | None:
    """Rank 0's connections to the others; None in a single process."""
    return _leader


def rescue(how: str) -> None:
    """Note how to go on if another rank dies."""
    if _leader:
        _leader.rescue = how


def check_alive() -> None:
    """Raise `RankError` if another rank ended."""
    if _leader:
        time.sleep(NOTICE)
        _leader.check_alive()


def together(work: Callable[[], None]) -> None:
    """Do work that all ranks do at the same time, such as a collective, and wait until it is done here.

    Rank 0 raises what went wrong on another one meanwhile, or `RankError` if it ended; the others end with rank 0.
    """
    if _leader:
        _leader.together(work)
    else:
        work()


class Leader:
    """Rank 0's connections to the others. ``rescue`` says how to go on if one of them dies."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.readers: list[threading.Thread] = []
        self.gone: list[int] = []
        self.rescue = "start again"
        self.ended = False

    def begin(self, options: Any, device: torch.device) -> None:
        """Let the other ranks begin, and connect to them."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        session = announce(self.store, self.size, (options, backend), patience=math.inf)
        _in_background(lambda: connect(self.store, session, self.rank, self.size, backend))
        for rank in range(1, self.size):
            self.readers.append(threading.Thread(target=self._read, args=(rank, device), daemon=True))
            self.readers[-1].start()

    def send(self, rank: int, work: Any) -> None:
        """Send work, any object that can be pickled."""
        try:
            send(rank, work)
        except RuntimeError:
            time.sleep(NOTICE)
            self.gone.append(rank)
            self.check_alive()

    def answer(self) -> tuple[int, Any]:
        """Wait for the next answer: the rank it is from, and what it says. Raises what went wrong there."""
        rank, message = self.inbox.get()
        if message is None:
            self.check_alive()
        if isinstance(message, Failure):
            # It may be the death of a third one that it noticed.
            time.sleep(NOTICE)
            self.check_alive()
            reason = message.reason if message.of_all else f"rank {rank}: {message.reason}"
            error = (UserError if message.status == 2 else RankError)(reason)
            error.add_note(message.traceback)
            raise error
        return rank, message

    def has_answer(self) -> bool:
        """Whether `answer` would not wait."""
        return not self.inbox.empty()

    def together(self, work: Callable[[], None]) -> None:
        """Do work that all ranks do, and listen to the others meanwhile: they may never come to it."""
        threading.Thread(target=self._answer_myself, args=(work,), daemon=True).start()
        self.answer()

    def _answer_myself(self, work: Callable[[], None]) -> None:
        try:
            work()
            self.inbox.put((0, True))
        except Exception as error:
            self.inbox.put((0, _failure(error)))

    def check_alive(self) -> None:
        """Raise `RankError` if a connection was closed."""
        if self.gone:
            raise RankError(self._obituary())

    def _obituary(self) -> str:
        # The first one gone: others end because of it.
        return f"rank {self.gone[0]} died; {self.rescue}"

    def end(self, status: int) -> None:
        """Let the other ranks end with this exit status."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.ended = True
        if not self.readers:
            # torchrun ends the others where the status is bad.
            announce(self.store, self.size, status, patience=GRACE / 4 if status else math.inf)
        others = range(1, len(self.readers) + 1)
        tellers = [threading.Thread(target=self._tell, args=(rank, status), daemon=True) for rank in others]
        for thread in tellers:
            thread.start()
        for thread in tellers:
            thread.join(GRACE / 4)
        for thread in self.readers:
            thread.join(NOTICE)

    def _tell(self, rank: int, status: int) -> None:
        # It may have ended already.
        with suppress(RuntimeError):
            send(rank, status)

    def _read(self, rank: int, device: torch.device) -> None:
        try:
            while True:
                self.inbox.put((rank, receive(rank, device)))
        except Exception:
            self.gone.append(rank)
            self.inbox.put((rank, None))
        if not self.ended:
            # The command learns of it when it next waits for an answer; it may be long about its own work.
            time.sleep(GRACE)
            os.write(sys.stderr.fileno(), f"\nerror: {self._obituary()}\n".encode())
            os._exit(1)


_leader: Leader | None = None


def _terminated(number: int, _: FrameType | None) -> None:
    """SIGTERM when nothing is there to be saved: torchrun sends it when a rank ended, or when it is to end itself."""
    check_alive()
    raise KeyboardInterrupt


def _exit(status: int) -> NoReturn:
    """End at once: an ordinary exit would wait for connections that nobody answers any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow(assist: Assist) -> NoReturn:
    """Wait for rank 0 to begin, and assist it until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            store, rank, size = rendezvous()
            session, order = hear(store, rank)
            if isinstance(order, int):
                _exit(order)
            # From here on rank 0 says when to end.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            options, backend = order
            connect(store, session, rank, size, backend)
            inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=_read_work, args=(inbox,), daemon=True).start()
            try:
                assist(options, inbox.get, lambda answer: send(0, answer))
            except Exception as error:
                send(0, _failure(error))
            # Rank 0 ends this process.
            threading.Event().wait()
    finally:
        _exit(1)


def _read_work(inbox: queue.SimpleQueue[Any]) -> None:
    """Take in work while other work is done: a rank ends with rank 0, not after its step."""
    status = 1
    try:
        while not isinstance(message := receive(0, torch.device("cpu")), int):
            inbox.put(message)
        status = message
    finally:
        _exit(status)


def _failure(error: Exception) -> Failure:
    details = traceback.format_exc()
    if isinstance(error, UserError | BackendError):
        return Failure(2, str(error), details)
    if isinstance(error, RankError):
        return Failure(1, str(error), details, of_all=True)
    return Failure(1, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", details)


def _in_background(work: Callable[[], None]) -> None:
    """Do something that blocks, and let signals through meanwhile."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]

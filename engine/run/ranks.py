"""One command as several processes: rank 0 runs it, and the others do what it asks of them.

    torchrun --nproc-per-node=4 -m engine.evolve --flops 300M
    torchrun --nproc-per-node=4 -m -- engine.evolve --flops 300M --run RUN

Without ``--`` torchrun takes ``--run`` for the beginning of an option of its own.

Rank 0 alone reads the command line, writes files and prints. The others begin when it has checked its input (`begin`),
answer what it sends, and end with it: with its exit status when it ends in order, else as soon as their connections
to it close. A rank that dies shows on rank 0 in the same way.

Messages are a kind and a size, then as many bytes. They go over gloo; tensors on GPUs go over NCCL.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from engine.errors import RankError, UserError
from kernels.backends import BackendError

# Ranks wait for each other as long as they live.
PATIENCE = timedelta(days=100)
# Seconds that rank 0 may take over its step when it is to end: torchrun kills after 30.
GRACE = 20
# Seconds within which the end of a rank shows in its connections.
NOTICE = 0.2

OBJECT, TENSOR = 0, 1

# What another rank does with the options of the command: take in work, give answers.
Assist = Callable[[Any, Callable[[], Any], Callable[[Any], None]], None]


@dataclass(frozen=True)
class Failure:
    """What went wrong on another rank, and the exit status it asks for."""

    status: int
    reason: str
    traceback: str


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(command: Callable[[], int], assist: Assist) -> int:
    """Run ``command`` on rank 0 and ``assist(options, next_work, answer)`` on the others.

    Returns the exit status in a single process; one of several ends here.
    """
    if not is_launched():
        return command()
    if int(os.environ["RANK"]):
        _follow(assist)
    global _leader
    _leader = Leader(*_rendezvous())
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


def leader() -> Leader | None:
    """Rank 0's connections to the others; None in a single process."""
    return _leader


def check_alive() -> None:
    """Raise `RankError` if another rank ended."""
    if _leader:
        time.sleep(NOTICE)
        _leader.check_alive()


class Leader:
    """Rank 0's connections to the others. ``resumable`` says whether what was done so far is on disk."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.readers: list[threading.Thread] = []
        self.gone: list[int] = []
        self.resumable = self.ended = False

    def begin(self, options: Any, device: torch.device) -> None:
        """Let the other ranks begin, and connect to them."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        self.store.set("begin", pickle.dumps((options, backend)))
        _in_background(lambda: _connect(self.store, self.rank, self.size, backend))
        for rank in range(1, self.size):
            self.readers.append(threading.Thread(target=self._read, args=(rank, device), daemon=True))
            self.readers[-1].start()

    def send(self, rank: int, work: Any) -> None:
        """Send work, any object that can be pickled."""
        try:
            _send(rank, work)
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
            error = (UserError if message.status == 2 else RankError)(f"rank {rank}: {message.reason}")
            error.add_note(message.traceback)
            raise error
        return rank, message

    def has_answer(self) -> bool:
        """Whether `answer` would not wait."""
        return not self.inbox.empty()

    def check_alive(self) -> None:
        """Raise `RankError` if a connection was closed."""
        if self.gone:
            raise RankError(self._obituary())

    def _obituary(self) -> str:
        # The first one gone: others end because of it.
        saved = "; everything done so far is saved: the same command with --resume goes on, on any number of ranks"
        return f"rank {self.gone[0]} died{saved if self.resumable else ': start again'}"

    def end(self, status: int) -> None:
        """Let the other ranks end with this exit status."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.ended = True
        if not self.readers:
            self.store.set("begin", pickle.dumps(status))
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
            _send(rank, status)

    def _read(self, rank: int, device: torch.device) -> None:
        try:
            while True:
                self.inbox.put((rank, _receive(rank, device)))
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


# -- the other ranks -------------------------------------------------------------------------------------------------


def _follow(assist: Assist) -> NoReturn:
    """Wait for rank 0 to begin, and assist it until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            store, rank, size = _rendezvous()
            order = pickle.loads(store.get("begin"))
            if isinstance(order, int):
                _exit(order)
            # From here on rank 0 says when to end.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            options, backend = order
            _connect(store, rank, size, backend)
            inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=_read_work, args=(inbox,), daemon=True).start()
            try:
                assist(options, inbox.get, lambda answer: _send(0, answer))
            except Exception as error:
                _send(0, _failure(error))
                # Rank 0 ends this process.
                threading.Event().wait()
    finally:
        _exit(1)


def _read_work(inbox: queue.SimpleQueue[Any]) -> None:
    """Take in work while other work is done: a rank ends with rank 0, not after its step."""
    status = 1
    try:
        while not isinstance(message := _receive(0, torch.device("cpu")), int):
            inbox.put(message)
        status = message
    finally:
        _exit(status)


def _failure(error: Exception) -> Failure:
    details = traceback.format_exc()
    if isinstance(error, UserError | BackendError):
        return Failure(2, str(error), details)
    return Failure(1, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", details)


# -- messages --------------------------------------------------------------------------------------------------------


def _rendezvous() -> tuple[Any, int, int]:
    """What all ranks can read and write to find each other, the rank of this one, and how many there are."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=PATIENCE))


def _connect(store: Any, rank: int, size: int, backend: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _send(rank: int, message: Any) -> None:
    """Send bytes on some device as they are, and any other object pickled."""
    import torch.distributed as dist

    kind, content = TENSOR, message
    if not isinstance(message, Tensor):
        kind, content = OBJECT, torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
    if content.is_cuda:
        # Whoever receives on a GPU waits there from the moment it knows of the message.
        torch.cuda.synchronize(content.device)
    dist.send(torch.tensor([kind, len(content)]), rank)
    dist.send(content, rank)


def _receive(rank: int, device: torch.device) -> Any:
    """Wait for the next message of a rank; bytes come to ``device``."""
    import torch.distributed as dist

    header = torch.empty(2, dtype=torch.int64)
    dist.recv(header, rank)
    kind, size = header.tolist()
    content = torch.empty(size, dtype=torch.uint8, device=device if kind == TENSOR else "cpu")
    dist.recv(content, rank)
    return content if kind == TENSOR else pickle.loads(content.numpy().tobytes())


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

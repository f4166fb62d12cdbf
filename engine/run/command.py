"""The frame of a command: a frozen dataclass becomes its options, errors become one line and an exit status.

Exit status: 0 done; 1 failed; 2 bad input, found before any work; 130 and 143 interrupted by Ctrl-C and SIGTERM,
with everything done so far saved.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar, get_args

import torch
import tyro

from engine.errors import RankError, UserError
from engine.run import ranks, torchrun
from kernels import backends

Config = TypeVar("Config", bound="Options")
BOX = "│╭╮╰╯─┃"


@dataclass(frozen=True)
class Options:
    """Options every command has."""

    debug: bool = False
    """Show the traceback of an error."""


class Interrupted(BaseException):
    """A signal asked the command to stop, and it has saved its work, or could not wait for the end of a step."""

    def __init__(self, signal_number: int, saved: bool = True) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.status = 128 + signal_number
        self.says = "stopped; everything done so far is saved: the same command with --resume goes on"
        if not saved:
            self.says = "stopped within a step; the same command with --resume goes on from what was saved before"


class Interruption:
    """Turns SIGINT and SIGTERM into a question asked between steps; a second Ctrl-C ends the process at once.

    Where torchrun passes signals on, once more on Ctrl-C in a terminal, the first one counts, and a step that takes too
    long is not waited for.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Interruption:
        self.previous = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._wait_no_longer)
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if torchrun.is_launched():
            if self.received is None:
                self.received = number
                signal.alarm(ranks.GRACE)
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        # os.write: a print may be cut into by the very signal this handles.
        os.write(sys.stderr.fileno(), b"\nstopping as soon as what is done can be saved; once more to stop at once\n")

    def _wait_no_longer(self, *_: object) -> None:
        if self.received is not None:
            ranks.check_alive()
            raise Interrupted(self.received, saved=False)

    def stop_if_asked(self, save: Callable[[], object] = lambda: None) -> None:
        """Call between steps. When a signal came, save and raise `Interrupted`, or `RankError` if it came of that."""
        if self.received is not None:
            ranks.check_alive()
            save()
            raise Interrupted(self.received)


def run_command(main: Callable[[Config], None], config: type[Config], arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run ``main``, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main(_parse(config, arguments))
    except (UserError, backends.BackendError) as error:
        return _fail(2, str(error), debug)
    except Interrupted as stop:
        print(stop.says, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return _fail(130, "interrupted", debug)
    except RankError as error:
        return _fail(1, str(error), debug)
    except BrokenPipeError:
        return 1
    except Exception as error:
        lines = str(error).splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return _fail(1, reason if debug else f"{reason} (add --debug to see where)", debug)
    return 0


def _parse(config: type[Config], arguments: Sequence[str]) -> Config:
    complaint = io.StringIO()
    # Of a union of subcommands, one knows.
    module = next(iter(get_args(config)), config).__module__
    program = f"python -m {module if module != '__main__' else _module_name()}"
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, prog=program, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(BOX + " ") for line in complaint.getvalue().splitlines()]
        sentences = [line for line in lines[1:] if line]
        until = next((i for i, line in enumerate(lines[1:]) if not line and i > 0), len(sentences))
        message = " ".join(sentences[: max(until, 1)]) or lines[0]
        raise UserError(f"{message}; see {program} --help") from None


def _module_name() -> str:
    specification = sys.modules["__main__"].__spec__
    return specification.name if specification else "engine"


def _fail(status: int, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def use_device(name: str, backend: str) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, with the kernels' backend set; else `UserError`."""
    backends.use(backend)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    several = torchrun.is_launched()
    if several and name.startswith("cuda:"):
        raise UserError(f"--device {name}: every rank takes a GPU of its own; choose cuda, auto or cpu")
    if several and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        advice = "start no more ranks on it, or choose cpu" if several else "choose cpu or auto"
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; {advice}")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device

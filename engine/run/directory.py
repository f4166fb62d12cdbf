"""The run directory: what was asked for, what it was resolved to, and where everything lies.

RUN/config.toml         the options as given, and as resolved
RUN/splits.json         which image belongs to which split
RUN/metrics.jsonl       one line per logged step
RUN/checkpoints/step-N  the last two checkpoints
"""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from engine.errors import UserError
from engine.files import write_atomically
from engine.run import torchrun

Config = TypeVar("Config")
CONFIG = "config.toml"
# Options that say how a run is carried out, not what it computes: a resumed run takes those it is given.
FREE = {"out", "resume", "overwrite", "debug", "device", "checkpoint_minutes", "memory", "profile"}
# Options of the same kind that a resumed run keeps unless it is given others.
KEPT = {"cache"}


def check_output(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise `UserError` unless a command may write to ``out``: it is new, to be resumed, or to be overwritten."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them")
    if resume and not (out / CONFIG).is_file():
        raise UserError(f"there is nothing to resume in {out}: start without --resume")
    if out.exists() and not resume:
        occupied = not out.is_dir() or any(out.iterdir())
        if occupied and not (overwrite and (out / CONFIG).is_file()):
            advice = (
                "is no run directory" if overwrite else "exists: add --resume to continue or --overwrite to start anew"
            )
            raise UserError(f"{out} {advice}, or choose another folder with --out")


def start_output(out: Path, options: Any, resolved: dict[str, Any]) -> None:
    """Empty ``out`` and write ``config.toml``. Call it after everything that can be refused was checked."""
    if out.exists():
        # Renamed first: a crash must not leave half a run under this name.
        replaced = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
        shutil.rmtree(replaced)
    given = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in FREE and v is not None
    }
    config = {"options": given, "resolved": resolved, "launch": torchrun.launch_id()}
    write_atomically(out / CONFIG, tomli_w.dumps(_without_none(config)))


def continued(options: Config, out: Path) -> Config:
    """The options, to resume what the same torchrun has begun: it starts all processes again when one has died."""
    launch = torchrun.launch_id()
    if launch is None or not (out / CONFIG).is_file() or read_config(out).get("launch") != launch:
        return options
    return dataclasses.replace(options, resume=True, overwrite=False)  # type: ignore[type-var]


def read_config(out: Path) -> dict[str, Any]:
    """The content of ``config.toml``. Raises `UserError` if it is missing or damaged."""
    path = out / CONFIG
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not all(isinstance(config.get(table), dict) for table in ("options", "resolved")):
        raise UserError(f"{path} is damaged: it lacks the tables options and resolved")
    return config


def resumed_options(options: Config, out: Path) -> Config:
    """The options a run was started with, taken from its ``config.toml``.

    An option that is given now, differs from its default and from what the run was started with is refused: a
    resumed run computes what the uninterrupted one would have.
    """
    stored = read_config(out)["options"]
    values = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        now = getattr(options, field.name)
        if field.name in FREE:
            continue
        # A run of an earlier version was started without the options that came later: with their defaults.
        then = stored.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        then = Path(then) if isinstance(now, Path) and then is not None else then
        if field.name in KEPT and now != field.default:
            continue
        if now not in (field.default, then):
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} {now}: the run in {out} was started with {then}; resume without it, or start anew")
        values[field.name] = then
    return dataclasses.replace(options, **values)  # type: ignore[type-var]


def _without_none(value: Any) -> Any:
    """TOML has no null: leave such entries out."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return list(value) if isinstance(value, tuple) else value

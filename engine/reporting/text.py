"""Numbers and command lines as a report writes them."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from typing import Any

from engine.run.directory import FREE

NONE = "–"
NBSP = "\u00a0"
Z_95 = 1.959964


def count(number: float, digits: str = "#.4g") -> str:
    """A count with four digits and its magnitude: ``272.8 M``, ``4.089 G``, ``512``; ``.4g`` drops zeros at the end."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:{digits}}".rstrip(".") + NBSP + unit
    return f"{number:.4g}"


def size(number: float, digits: str = "#.4g") -> str:
    """A number of bytes: ``3.864 MB``."""
    text = count(number, digits)
    return text + ("B" if text[-1].isalpha() else f"{NBSP}B")


def percent(share: float, digits: int = 1) -> str:
    """A share in percent, with one decimal; a dash for NaN."""
    return NONE if math.isnan(share) else f"{100 * share:.{digits}f}{NBSP}%"


def share_of(correct: int, images: int) -> str:
    """``88.1 % (317/360)``."""
    return f"{percent(correct / images)} ({correct}/{images})"


def confidence(correct: int, images: int) -> str:
    """The 95 % interval of a share, by Wilson's score: ``96.4–99.2 %``."""
    p, z2 = correct / images, Z_95**2 / images
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    return f"{100 * max(centre - half, 0):.1f}–{100 * min(centre + half, 1):.1f}{NBSP}%"


def amount(name: str, value: float) -> str:
    """The bound of a budget with its unit: ``300 M MACs``, ``2.5 ms``."""
    if name == "memory_peak":
        return f"{size(value, '.4g')} of peak memory"
    return count(value, ".4g") + NBSP + {"flops": "MACs", "params": "parameters", "latency": "ms"}[name]


def milliseconds(value: float) -> str:
    """``4.273 ms``."""
    return f"{value:#.4g}".rstrip(".") + f"{NBSP}ms"


def command(module: str, config: Any, options: Mapping[str, Any], **where: object) -> str:
    """The command line that gives a command these options; those at their defaults and those in FREE are left out.

    ``where`` are options added at the end, whatever their defaults are.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = {name: value for name, value in options.items() if name not in FREE | set(where)}
    changed = {name: value for name, value in given.items() if str(value) != str(defaults.get(name))}
    return shlex.join(["python", "-m", module, *_arguments(changed), *_arguments(where)])


def _arguments(options: Mapping[str, Any]) -> list[str]:
    arguments = []
    for name, value in options.items():
        if value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments += [str(entry) for entry in (value if isinstance(value, list | tuple) else [value])]
    return arguments

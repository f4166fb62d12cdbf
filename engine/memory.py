"""How much memory there is, and how it is said on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from engine.errors import UserError

# Part of the free memory that activations take if nothing is said. A GPU wants many structures in a launch.
DEFAULT_SHARE = {"cpu": 0.06, "cuda": 0.25}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))):
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_memory(device: torch.device) -> int:
    """Bytes of activations that scoring may hold at once if nothing is said: 6 % of what is free, 25 % on a GPU."""
    return int(free_memory(device) * DEFAULT_SHARE[device.type])


def parse_memory(text: str, device: torch.device) -> int:
    """Bytes of ``2G``, ``500M``, ``25%`` of what is free, or ``auto``; `UserError` for anything else."""
    if text == "auto":
        return default_memory(device)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG%]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"--memory {text}: legal are bytes as 2G or 500M, a part of what is free as 25%, and auto")
    amount, unit = float(found[1]), found[2].upper()
    size = int(amount / 100 * free_memory(device)) if unit == "%" else int(amount * UNITS[unit])
    if size < 1 or (unit == "%" and amount > 100):
        raise UserError(f"--memory {text}: must be more than nothing and at most 100%")
    return size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: PyTorch has no one type for it on every device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"can't allocate memory|out of memory|bad_alloc|not enough memory", str(error))
    )

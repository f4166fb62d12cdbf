"""What the bits of a result depend on besides its input."""

from __future__ import annotations

import torch

from kernels import backends


def machine_facts(device: torch.device) -> dict[str, str]:
    """The version of PyTorch, and the processor with the instruction set that the kernels use."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        kernels = backends.extension.build_info()["instruction_set"] if backends.extension else "no C++ kernels"
        processor = f"{torch.backends.cpu.get_cpu_capability()}, {kernels}"
    return {"torch": torch.__version__, "processor": processor}

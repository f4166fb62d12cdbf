from typing import Any

no_cuda: str
"""Why no CUDA kernels were compiled, empty if they were."""

def build_info() -> dict[str, Any]: ...
def peak_flops(seconds: float, bf16: bool = False) -> float: ...

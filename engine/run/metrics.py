"""The log of a run: ``metrics.jsonl``, one JSON object a line, and TensorBoard on request."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.errors import UserError


class MetricsLog:
    """Appends records; resuming cuts the file back to what the checkpoint knew, so nothing is logged twice."""

    def __init__(self, run: Path, keep_bytes: int = 0, tensorboard: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self.path.touch()
        os.truncate(self.path, min(keep_bytes, self.path.stat().st_size))
        self.file = self.path.open("a", encoding="utf-8")
        self.writer = _summary_writer(run / "tensorboard") if tensorboard else None

    def write(self, step: int, record: dict[str, float]) -> None:
        """Append one record of a step."""
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, step)  # type: ignore[attr-defined]

    def size(self) -> int:
        """Bytes written so far, on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()  # type: ignore[attr-defined]


def check_tensorboard() -> None:
    """Raise `UserError` unless TensorBoard can be imported."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install 'metaprune[tensorboard]'") from None


def _summary_writer(folder: Path) -> object:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))

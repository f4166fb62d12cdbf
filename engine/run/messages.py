"""How processes find each other, and what they send: a kind and a size, then as many bytes.

Messages go over gloo; tensors on GPUs go over NCCL. Before they are connected, processes read and write a store. It
outlives them: where torchrun starts them again it still holds what those before have written. So each process that
waits for rank 0 goes by a name of its own, and rank 0 answers whatever name a rank goes by until the rank says that it
has heard.
"""

from __future__ import annotations

import pickle
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

# Ranks wait for each other as long as they live.
PATIENCE = timedelta(days=100)

# Seconds between two looks at the store.
PAUSE = 0.02

OBJECT, TENSOR = 0, 1


def rendezvous() -> tuple[Any, int, int]:
    """What all ranks can read and write to find each other, the rank of this one, and how many there are."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=PATIENCE))


def announce(store: Any, size: int, message: Any, patience: float) -> str:
    """On rank 0: give all others a message, within so many seconds. Returns a name for what they do from there on."""
    session, until, waiting = uuid4().hex, time.monotonic() + patience, set(range(1, size))
    content = pickle.dumps((session, message))
    while waiting and time.monotonic() < until:
        for rank in waiting:
            if store.check([f"name of {rank}"]):
                store.set(store.get(f"name of {rank}").decode(), content)
        waiting = {rank for rank in waiting if not store.check([f"{session} heard by {rank}"])}
        time.sleep(PAUSE)
    return session


def hear(store: Any, rank: int) -> tuple[str, Any]:
    """On another rank: wait for what rank 0 announces."""
    name = uuid4().hex
    store.set(f"name of {rank}", name)
    session, message = pickle.loads(store.get(name))
    store.set(f"{session} heard by {rank}", "")
    return session, message


def connect(store: Any, session: str, rank: int, size: int, backend: str) -> None:
    """Connect this process to all others."""
    import torch.distributed as dist

    own = dist.PrefixStore(session, store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENCE)


def send(rank: int, message: Any) -> None:
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


def receive(rank: int, device: torch.device) -> Any:
    """Wait for the next message of a rank; bytes come to ``device``."""
    import torch.distributed as dist

    header = torch.empty(2, dtype=torch.int64)
    dist.recv(header, rank)
    kind, size = header.tolist()
    content = torch.empty(size, dtype=torch.uint8, device=device if kind == TENSOR else "cpu")
    dist.recv(content, rank)
    return content if kind == TENSOR else pickle.loads(content.numpy().tobytes())

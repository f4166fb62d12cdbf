"""Training by several ranks against DistributedDataParallel on the gradient that plain autograd makes."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine.factored_sgd import FactoredSGD
from engine.pruningnet import PruningNet
from engine.run.optimizer import SGD
from engine.run.team import Team
from engine.space.recipe import Recipe

sys.path.append(str(Path(__file__).parents[1]))
from structures import random_genomes, tiny_space

RECIPE = Recipe(batch=12, epochs=1, lr=0.1, schedule="linear", weight_decay=1e-3)
STEPS = 4


def counting(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DistributedDataParallel does with a bucket of gradients, counting its bytes."""
    buffer = bucket.buffer()
    sent.append(buffer.nbytes)
    work: Any = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def both(hidden: int, team: Team) -> dict[str, int]:
    """Train both ways on the same structures and images: how many bytes each has exchanged.

    Raises `AssertionError` unless both have the same weights, to rounding, and all ranks the same bits.
    """
    space = tiny_space()
    net, plain_net = (PruningNet(space, hidden, torch.Generator().manual_seed(0)).double() for _ in range(2))
    ours, theirs = FactoredSGD(net, RECIPE, team=team), SGD(plain_net.named_parameters(), RECIPE)
    replica, sent = DistributedDataParallel(plain_net), list[int]()
    replica.register_comm_hook(sent, counting)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(RECIPE.batch, 3, 32, 32, generator=generator).double()[team.own(RECIPE.batch)]
        labels = torch.randint(space.classes, (RECIPE.batch,), generator=generator)[team.own(RECIPE.batch)]
        genome_SG = random_genomes(space, team.size, step)
        logits_NK = ours.logits(images, genome_SG).flatten(0, 1)
        (F.cross_entropy(logits_NK, labels, reduction="sum") / RECIPE.batch).backward()
        ours.step(RECIPE.lr)
        F.cross_entropy(replica(images, genome_SG[team.own(team.size)]), labels).backward()
        theirs.step(RECIPE.lr)
        torch.testing.assert_close(net.state_dict(), plain_net.state_dict(), rtol=1e-9, atol=1e-11)
    exchanged = team.exchanged
    team.verify(net.state_dict())
    return {"ours": exchanged, "theirs": sum(sent)}


def compare(store: dist.Store, rank: int, size: int, output: Path) -> NoReturn:
    """On every rank: write what each way exchanged with the paper's hidden sizes."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    output.write_text(json.dumps({hidden: both(hidden, Team(rank, size)) for hidden in (32, 64)}))
    os._exit(0)

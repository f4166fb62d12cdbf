import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from structures import genomes, names, space_of, tiny_space
from torch import Tensor, nn

import engine.pruned
from engine.pruned import PrunedNet
from engine.space.structure import convolutions

LAYERS = [
    {"name": "stem", "source": "image", "in_channels": 3, "out_channels": 5, "kernel": 3, "stride": 2,
     "depthwise": False, "activation": "relu", "shortcut": None, "max_pool": True},
    {"name": "block.depthwise", "source": "stem", "in_channels": 5, "out_channels": 5, "kernel": 3, "stride": 1,
     "depthwise": True, "activation": "relu6", "shortcut": None, "max_pool": False},
    {"name": "block.project", "source": "block.depthwise", "in_channels": 5, "out_channels": 5, "kernel": 1,
     "stride": 1, "depthwise": False, "activation": "none", "shortcut": "stem", "max_pool": False},
]  # fmt: skip


class ByHand(nn.Module):
    """What ``LAYERS`` describe, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(5)
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(5)
        self.project = nn.Conv2d(5, 5, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(5)
        self.classifier = nn.Linear(5, 7)

    def forward(self, images: Tensor) -> Tensor:
        stem = nn.functional.max_pool2d(self.stem_norm(self.stem(images)).relu(), 3, stride=2, padding=1)
        inner = nn.functional.relu6(self.depthwise_norm(self.depthwise(stem)))
        return self.classifier((self.project_norm(self.project(inner)) + stem).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_network_is_the_network_its_layers_describe(training: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    by_hand, net = ByHand().train(training), PrunedNet(LAYERS, classes=7).train(training)
    with torch.no_grad():
        for tensor in by_hand.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1, generator=generator)
    # Both list convolution, norm, convolution, norm, …, classifier.
    net.load_state_dict(dict(zip(net.state_dict(), by_hand.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 21, 21, generator=generator)
    torch.testing.assert_close(net(images), by_hand(images))


@settings(max_examples=4)
@given(st.data(), names)
def test_a_pruned_network_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.mktemp("net") / "model.safetensors"
    space = space_of(name, 10)
    layers = convolutions(space, data.draw(genomes(space))[0])
    net = PrunedNet(layers, 10)
    images = torch.randn(2, 3, 64, 64)
    net(images)  # moves the running statistics away from where every network starts
    save_file(net.state_dict(), path)
    loaded = PrunedNet(layers, 10)
    loaded.load_state_dict(load_file(path))
    assert torch.equal(loaded.eval()(images), net.eval()(images))


def test_a_network_with_other_widths_does_not_take_the_weights() -> None:
    narrow, wide = (PrunedNet(convolutions(tiny_space(), torch.tensor([c, c, c])), 5) for c in (5, 30))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(narrow.state_dict())


def test_the_file_of_the_network_runs_where_there_is_nothing_but_pytorch(tmp_path: Path) -> None:
    shutil.copy(str(engine.pruned.__file__), tmp_path / "network.py")
    program = f"""
import sys
sys.modules.update(engine=None, kernels=None)  # importing either now fails
sys.path.insert(0, {str(tmp_path)!r})
import torch
allowed = {{name.partition(".")[0] for name in sys.modules}}
from network import PrunedNet
print(PrunedNet({LAYERS!r}, 7)(torch.zeros(2, 3, 16, 16)).shape)
print({{name.partition(".")[0] for name in sys.modules}} - allowed - sys.stdlib_module_names)
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["torch.Size([2, 7])", "{'network'}"]

"""Every runtime gives the module's answers, and what is compared is timed in turn."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import genomes, space_of, tiny_space
from torch import Tensor, fx

from engine import runtimes
from engine.errors import UserError
from engine.inference import inference_module, onnx_model, pad_channels
from engine.pruned import PrunedNet
from engine.runtimes import RUNTIMES, Network, Program, Runtime, Settings, Timing, measure, measure_structures, prepare
from engine.space.costs import cost_model
from engine.space.structure import convolutions, make_structure


def trained(genome_1G: Tensor) -> PrunedNet:
    """A network whose BatchNorm has something to fold."""
    net = PrunedNet(convolutions(tiny_space(), genome_1G[0]), 5).eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1) if tensor.ndim == 1 else tensor.normal_(std=0.3)
    return net


def tiny_network(choice: int = 9) -> Network:
    return Network(convolutions(tiny_space(), tiny_space().uniform_choice(choice)[0]), 5, 32)


@settings(max_examples=8)
@given(st.data(), st.integers(1, 9))
def test_folding_and_padding_change_no_answer(data: st.DataObject, multiple: int) -> None:
    genome_1G = data.draw(genomes(tiny_space()))
    net, images = trained(genome_1G), torch.randn(2, 3, 32, 32)
    wide = pad_channels(net, convolutions(tiny_space(), genome_1G[0]), multiple)
    widths = [module.out_channels for module in wide.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(width % multiple == 0 for width in widths)
    with torch.no_grad():
        expected = net(images)
        for same in (inference_module(net), wide, inference_module(wide)):
            torch.testing.assert_close(same(images), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


@settings(max_examples=6)
@given(st.data(), st.integers(1, 2))
def test_an_exported_model_gives_the_answers_of_its_own_weights(data: st.DataObject, batch: int) -> None:
    """All but the first of these are made from the export of another structure."""
    ort = pytest.importorskip("onnxruntime")
    net, images = trained(data.draw(genomes(tiny_space()))), torch.randn(batch, 3, 32, 32)
    session = ort.InferenceSession(onnx_model(inference_module(net), images), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(images)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_gives_the_answers_of_the_module(runtime: str) -> None:
    if reason := RUNTIMES[runtime].why_not("cpu"):
        pytest.skip(reason)
    if runtime == "torch-compile" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    # `prepare` raises if the answers differ. Two layers, because compiling takes its time.
    stem, last = tiny_network().convolutions[0], tiny_network().convolutions[-1]
    layers = [stem, {**last, "source": "stem", "in_channels": stem["out_channels"]}]
    network = Network(layers, 5, 32) if runtime == "torch-compile" else tiny_network()
    program = prepare(network, Settings(runtime, resolution=32, batch=2, pad=RUNTIMES[runtime].pad()))
    first, again = (program.logits(program.call()) for _ in range(2))
    assert first.shape == (2, 5)
    assert torch.equal(first, again)


def test_a_runtime_that_gives_other_answers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: fx.GraphModule, images: Tensor, settings: Settings) -> Program:
        return Program(lambda: module(images) * 1.01, lambda logits: logits)

    monkeypatch.setitem(RUNTIMES, "wrong", Runtime(wrong, lambda device: None))
    with pytest.raises(RuntimeError, match="wrong gives other answers"):
        measure([tiny_network()], Settings("wrong", resolution=32))


def test_networks_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def recording(module: fx.GraphModule, images: Tensor, settings: Settings) -> Program:
        width = module.get_parameter("classifier.weight").shape[1]

        def call() -> Tensor:
            calls.append(width)
            return module(images)

        return Program(call, lambda logits: logits)

    monkeypatch.setitem(RUNTIMES, "recording", Runtime(recording, lambda device: None))
    narrow, wide = tiny_network(), tiny_network()
    last = {**wide.convolutions[-1], "out_channels": 24}
    wide = Network([*wide.convolutions[:-1], last], 5, 32)
    timings = measure([narrow, wide], Settings("recording", resolution=32), rounds=3)
    assert [len(timing.rounds) for timing in timings] == [3, 3]
    turns = [width for width, before in zip(calls, [0, *calls], strict=False) if width != before]
    # Compared, warmed up, then three rounds.
    assert turns == [16, 24] * 5


def test_a_timing_is_the_median_of_its_rounds_with_their_spread() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.ms == 3.0
    assert timing.spread == pytest.approx((4 - 2) / 3)


def test_structures_and_lists_of_convolutions_are_measured_alike_and_threads_are_put_back() -> None:
    space = space_of("mobilenet_v1")
    small, large = (space.uniform_choice(choice)[0] for choice in (0, 30))
    structure = make_structure(cost_model(space, 32), small, 32)
    lists = [convolutions(space, genome) for genome in (small, large)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # The resolution is that of the settings: 32 would do for the structure, 64 is what is asked for.
        timings = measure_structures([structure, *lists], Settings("torch", resolution=64), rounds=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    # A hundredth of the MACs.
    assert max(timings[0].ms, timings[1].ms) < timings[2].ms


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Settings("tensorflow"), "torch, torch-compile, onnx"),
        (Settings("torch", device="tpu"), "cpu or cuda"),
        (Settings("torch", batch=0), "--batch 0: at least 1"),
        (Settings("torch", pad=0), "--pad 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Settings, says: str) -> None:
    with pytest.raises(UserError, match=says):
        measure([tiny_network()], settings)


def test_without_onnx_runtime_the_user_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'metaprune\[onnx\]'"):
        Settings("onnx").check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no usable GPU"):
        Settings("torch", device="cuda").check()

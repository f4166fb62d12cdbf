"""A plain network as it is deployed: BatchNorm folded, channels padded, exported to ONNX."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.pruned import ConvBlock, PrunedNet
from engine.space.space import IMAGE


def inference_module(net: PrunedNet) -> fx.GraphModule:
    """A copy for inference: BatchNorm folded, activations in place, channels-last, every tensor freed when unused."""
    net = copy.deepcopy(net).eval()
    for block in net.convs.values():
        assert isinstance(block, ConvBlock)
        block.conv = fuse_conv_bn_eval(block.conv, block.norm)
        block.norm = nn.Identity()  # type: ignore[assignment]
        if not isinstance(block.activation, nn.Identity):
            block.activation.inplace = True
    module = fx.symbolic_trace(net).requires_grad_(False)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pad_channels(net: PrunedNet, convolutions: Sequence[Mapping[str, Any]], multiple: int) -> PrunedNet:
    """The same function, of a network of these ``convolutions``, with every width a multiple of ``multiple``.

    The added channels have zero weights, so they stay zero and nothing reads them. Some runtimes are much faster so:
    ONNX Runtime leaves its blocked layout for odd widths.
    """
    wide = PrunedNet(padded(convolutions, multiple), net.classifier.out_features)
    state = wide.state_dict()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            state[name].fill_(1)
        elif tensor.ndim:
            state[name].zero_()
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    wide.load_state_dict(state)
    return wide.train(net.training)


def padded(convolutions: Sequence[Mapping[str, Any]], multiple: int) -> list[dict[str, Any]]:
    """The convolutions with every width but that of images rounded up to a multiple."""

    def up(width: int) -> int:
        return -(-width // multiple) * multiple

    return [
        {
            **conv,
            "in_channels": conv["in_channels"] if conv["source"] == IMAGE else up(conv["in_channels"]),
            "out_channels": up(conv["out_channels"]),
        }
        for conv in convolutions
    ]


# Exported models without their weights, by their layers without sizes. Exporting takes seconds; sizes change only the
# shapes of images and weights and the attributes of convolutions.
_templates: dict[Any, Any] = {}


def onnx_model(module: fx.GraphModule, images: Tensor) -> bytes:
    """The module as a serialised ONNX model for images of this shape."""
    leaves = dict(module.named_modules())
    key = (
        module.code,
        tuple((name, type(leaf)) for name, leaf in leaves.items()),
        module.get_parameter("classifier.bias").shape,
    )
    if key not in _templates:
        _templates[key] = _exported(module, images)
    model, weights = _templates[key], dict(module.named_parameters())
    filled = type(model)()
    filled.CopyFrom(model)
    for size, dimension in zip(images.shape, filled.graph.input[0].type.tensor_type.shape.dim, strict=True):
        dimension.dim_value = size
    filled.graph.output[0].type.tensor_type.shape.dim[0].dim_value = len(images)
    for initializer in filled.graph.initializer:
        if initializer.name in weights:
            weight = weights[initializer.name].contiguous()
            initializer.dims[:] = weight.shape
            initializer.raw_data = weight.numpy(force=True).tobytes()
    for node in filled.graph.node:
        if node.op_type == "Conv":
            conv = leaves[node.input[1].removesuffix(".weight")]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(conv.padding, tuple)
            sizes = {"kernel_shape": conv.kernel_size, "strides": conv.stride, "pads": conv.padding * 2}
            for attribute in node.attribute:
                if attribute.name in sizes:
                    attribute.ints[:] = sizes[attribute.name]
                elif attribute.name == "group":
                    attribute.i = conv.groups
    return filled.SerializeToString()


def _exported(module: fx.GraphModule, images: Tensor) -> Any:
    """The exported model, its weights named as the module's and their content left out."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, (images,), dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]
    weights = dict(module.named_parameters())
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            initializer.ClearField("raw_data")
    return model

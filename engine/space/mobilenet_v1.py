"""MobileNetV1 (https://arxiv.org/abs/1704.04861): a stem, then thirteen depthwise-separable blocks."""

from engine.space.recipe import Recipe
from engine.space.space import IMAGE, IMAGE_CHANNELS, Conv, Gene, Space, Width, gene, genes_of

STEM = 32
# Output channels and stride of every block.
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
HIDDEN = 32

METATRAIN = Recipe(batch=512, epochs=64, lr=0.25, schedule="linear", weight_decay=4e-5)
RETRAIN = Recipe(batch=1024, epochs=256, lr=0.5, schedule="linear", weight_decay=4e-5)


def mobilenet_v1(classes: int = 1000) -> Space:
    """Thirteen genes: the outputs of the stem and of blocks 1–12; the last block keeps its 1024 channels."""
    width: Width = gene("stem", STEM)
    convs = [
        Conv("stem", IMAGE, IMAGE_CHANNELS, width, 3, 2, False, "relu", None, _context(width), HIDDEN),
    ]
    for number, (channels, stride) in enumerate(BLOCKS, start=1):
        block, source, cin = f"block{number}", convs[-1].name, width
        width = channels if number == len(BLOCKS) else gene(block, channels)
        context = _context(cin, width)
        convs += [
            Conv(f"{block}.depthwise", source, cin, cin, 3, stride, True, "relu", None, context, HIDDEN),
            Conv(
                f"{block}.pointwise",
                f"{block}.depthwise",
                cin,
                width,
                1,
                1,
                False,
                "relu",
                None,
                context,
                HIDDEN,
            ),
        ]
    return Space("mobilenet_v1", classes, genes_of(convs), tuple(convs))


def _context(*widths: Width) -> tuple[Gene, ...]:
    return tuple(width for width in widths if isinstance(width, Gene))

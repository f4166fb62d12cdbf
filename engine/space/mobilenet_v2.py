"""MobileNetV2 (https://arxiv.org/abs/1801.04381) with MetaPruning's maximum widths, about 1.4× the standard ones."""

from engine.space.recipe import Recipe
from engine.space.space import IMAGE, IMAGE_CHANNELS, Conv, Gene, Space, gene

STEM = 44
# Output channels, number of blocks, stride of the first block, and expansion of every stage.
STAGES = (
    (22, 1, 1, 1), (33, 2, 2, 6), (44, 3, 2, 6), (88, 4, 2, 6), (132, 3, 1, 6), (224, 3, 2, 6), (448, 1, 1, 6),
)  # fmt: skip
LAST = 1280
HIDDEN, HIDDEN_BLOCK = 32, 64

METATRAIN = Recipe(batch=512, epochs=64, lr=0.25, schedule="linear", weight_decay=0.0)
RETRAIN = Recipe(batch=1024, epochs=256, lr=0.5, schedule="linear", weight_decay=4e-5)


def mobilenet_v2(classes: int = 1000) -> Space:
    """Eight stage genes, each shared by the blocks of its stage, and one gene for the inner width of every block."""
    cin = gene("stem", STEM)
    stage_genes, mid_genes = [cin], []
    convs = [Conv("stem", IMAGE, IMAGE_CHANNELS, cin, 3, 2, False, "relu6", None, (cin,), HIDDEN)]
    for stage, (channels, blocks, first_stride, expansion) in enumerate(STAGES, start=1):
        cout = gene(f"stage{stage}", channels)
        stage_genes.append(cout)
        for number in range(1, blocks + 1):
            block, source = f"stage{stage}.{number}", convs[-1].name
            stride = first_stride if number == 1 else 1
            mid = gene(f"{block}.mid", expansion * cin.max_width)
            mid_genes.append(mid)
            convs += _inverted_residual(block, source, cin, mid, cout, stride)
            cin = cout
    convs.append(Conv("last", convs[-1].name, cin, LAST, 1, 1, False, "relu6", None, (cin,), HIDDEN))
    return Space("mobilenet_v2", classes, (*stage_genes, *mid_genes), tuple(convs))


def _inverted_residual(block: str, source: str, cin: Gene, mid: Gene, cout: Gene, stride: int) -> list[Conv]:
    shortcut = source if cin == cout and stride == 1 else None
    expand, depthwise, project = f"{block}.expand", f"{block}.depthwise", f"{block}.project"
    context, hidden = (mid, cin, cout), HIDDEN_BLOCK
    return [
        Conv(expand, source, cin, mid, 1, 1, False, "relu6", None, context, hidden),
        Conv(depthwise, expand, mid, mid, 3, stride, True, "relu6", None, context, hidden),
        Conv(project, depthwise, mid, cout, 1, 1, False, "none", shortcut, context, hidden),
    ]

"""ResNet-50 (https://arxiv.org/abs/1512.03385), the stride of a bottleneck in its 3×3 convolution."""

from engine.space.recipe import Recipe
from engine.space.space import IMAGE, IMAGE_CHANNELS, Conv, Gene, Space, Width, gene

STEM = 64
# Output channels, number of blocks, and stride of the first block of every stage.
STAGES = ((256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2))
BOTTLENECK = 4
HIDDEN = 32

METATRAIN = Recipe(256, 32, 0.1, "step", 1e-4, milestones=(8 / 32, 16 / 32, 24 / 32))
RETRAIN = Recipe(512, 128, 0.2, "step", 1e-4, milestones=(32 / 128, 64 / 128, 96 / 128))


def resnet50(classes: int = 1000) -> Space:
    """Genes: the stem, the outputs of stages 1–3 and the sixteen inner widths; the last stage keeps 2048 channels."""
    stem = gene("stem", STEM)
    stage_genes, mid_genes = [stem], []
    convs = [Conv("stem", IMAGE, IMAGE_CHANNELS, stem, 7, 2, False, "relu", None, (stem,), HIDDEN, max_pool=True)]
    cin: Width = stem
    for stage, (channels, blocks, first_stride) in enumerate(STAGES, start=1):
        cout: Width = channels
        if stage < len(STAGES):
            cout = gene(f"stage{stage}", channels)
            stage_genes.append(cout)
        for number in range(1, blocks + 1):
            block, source = f"stage{stage}.{number}", convs[-1].name
            mid = gene(f"{block}.mid", channels // BOTTLENECK)
            mid_genes.append(mid)
            convs += _bottleneck(block, source, cin, mid, cout, first_stride if number == 1 else 1, number == 1)
            cin = cout
    return Space("resnet50", classes, (*stage_genes, *mid_genes), tuple(convs), fixed_size_pooling=False)


def _bottleneck(block: str, source: str, cin: Width, mid: Gene, cout: Width, stride: int, project: bool) -> list[Conv]:
    reduce, spatial, expand, shortcut = (f"{block}.{part}" for part in ("reduce", "spatial", "expand", "shortcut"))
    context = tuple(width for width in (mid, cin, cout) if isinstance(width, Gene))
    convs = [
        Conv(reduce, source, cin, mid, 1, 1, False, "relu", None, context, HIDDEN),
        Conv(spatial, reduce, mid, mid, 3, stride, False, "relu", None, context, HIDDEN),
    ]
    if project:
        convs.append(Conv(shortcut, source, cin, cout, 1, stride, False, "none", None, context, HIDDEN))
    added = shortcut if project else source
    return [*convs, Conv(expand, spatial, mid, cout, 1, 1, False, "relu", added, context, HIDDEN)]

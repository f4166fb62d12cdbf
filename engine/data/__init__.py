"""Images: sources, deterministic splits, device-resident uint8, augmentation on the device.

``open_data`` is the way in; ``catalog`` lists the sources.
"""

from engine.data.dataset import Data, open_data
from engine.data.images import ImageSet, index_batches, join
from engine.data.preprocessing import Augmentation, Preprocessing, augment
from engine.data.splits import Splits

__all__ = [
    "Augmentation",
    "Data",
    "ImageSet",
    "Preprocessing",
    "Splits",
    "augment",
    "index_batches",
    "join",
    "open_data",
]

"""The text that a trainer reads, as bytes. node's trainer and evaluation, and experiments, may import this.

Path of a step: **data** -> transformer -> gate -> dispatch. `sources` finds documents, `cache` lays them down once as
two memory-mapped files (training and held-out), `shuffle` orders windows, `dataset` hands out batches.
"""

from __future__ import annotations

from node.data.dataset import TextDataset, open_dataset
from node.data.sources import WIKIPEDIA_ATTRIBUTION

__all__ = ["WIKIPEDIA_ATTRIBUTION", "TextDataset", "open_dataset"]

"""Shards -> samples -> batches: order and state, decoding, embedded and synthetic sets."""

from ds_linclip.data.eval_data import LabelledBatch, LabelledData
from ds_linclip.data.loader import Batch, TrainData
from ds_linclip.data.samples import DataError

__all__ = ["Batch", "DataError", "LabelledBatch", "LabelledData", "TrainData"]

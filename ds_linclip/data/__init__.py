"""Training and held-out data: from shards to decoded batches."""

from ds_linclip.data.captions import CaptionTokenizer, clean_text
from ds_linclip.data.eval.dataset import LabelledBatch, LabelledData
from ds_linclip.data.eval.image_text_shards import ImageTextShards
from ds_linclip.data.eval.unreadable import UnreadableImage, describe_unreadable
from ds_linclip.data.loader import Batch, TrainData
from ds_linclip.data.quality_report import DataReport
from ds_linclip.data.remote import Storage
from ds_linclip.data.sample_reader import DataError
from ds_linclip.data.shard_index import find_shards
from ds_linclip.data.transforms import EvalTransform

__all__ = [
    "Batch",
    "CaptionTokenizer",
    "DataError",
    "DataReport",
    "EvalTransform",
    "ImageTextShards",
    "LabelledBatch",
    "LabelledData",
    "Storage",
    "TrainData",
    "UnreadableImage",
    "clean_text",
    "describe_unreadable",
    "find_shards",
]

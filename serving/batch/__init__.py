"""Batch inference: predict a data folder with an exported model into Parquet files; resumable at any moment."""

from serving.batch.job import EVENTS, FORMAT, MANIFEST, SEGMENTS, Job, Manifest, PredictSplit, known_job
from serving.batch.predict import predict_folder

__all__ = [
    "EVENTS",
    "FORMAT",
    "MANIFEST",
    "SEGMENTS",
    "Job",
    "Manifest",
    "PredictSplit",
    "known_job",
    "predict_folder",
]

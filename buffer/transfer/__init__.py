"""Conversations in bulk, as JSONL files: into Postgres and out of it, past the buffer."""

from buffer.transfer.batch import Problem
from buffer.transfer.erasures import ErasureCounts, ReplayReport, export_erasures, replay_erasures
from buffer.transfer.exporter import ExportProgress, ExportReport, export
from buffer.transfer.importer import ImportProgress, ImportReport, import_file

__all__ = [
    "ErasureCounts",
    "ExportProgress",
    "ExportReport",
    "ImportProgress",
    "ImportReport",
    "Problem",
    "ReplayReport",
    "export",
    "export_erasures",
    "import_file",
    "replay_erasures",
]

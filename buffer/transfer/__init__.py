"""Conversations in bulk, as JSONL files: into Postgres and out of it, past the buffer."""

from buffer.transfer.batch import Problem
from buffer.transfer.exporter import ExportProgress, ExportReport, export
from buffer.transfer.importer import ImportProgress, ImportReport, import_file

__all__ = [
    "ExportProgress",
    "ExportReport",
    "ImportProgress",
    "ImportReport",
    "Problem",
    "export",
    "import_file",
]

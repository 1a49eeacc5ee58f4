"""Report of a run: `summary.json` for machines and a self-contained `report.html` for people."""

from jobs.report.environment import record_environment
from jobs.report.page import write_report
from jobs.report.read import Run, read_run
from jobs.report.summary import summarise, write_summary

__all__ = ["Run", "read_run", "record_environment", "summarise", "write_report", "write_summary"]

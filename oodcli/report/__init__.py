"""From scores files to metrics, tables and figures."""

from oodcli.report.files import refuse_existing_report, write_report

__all__ = ["refuse_existing_report", "write_report"]

"""From scores files to metrics, tables, figures, and a page that shows them."""

from oodcli.report.files import refuse_existing_report, write_report

__all__ = ["refuse_existing_report", "write_report"]

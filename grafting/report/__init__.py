"""The report of a run: one self-contained HTML page, and the same table for the terminal.

`write_report` reads what a run folder holds (`config.yaml`, `metrics.json`, `log.jsonl`, `samples/`), all of
it optional, and renders `report.html`; what is not there yet is named on the page. The page needs no network
and no other file: images are data URIs, charts are inline SVG that takes its colours from the page's light or
dark style.
"""

from grafting.report.page import write_report
from grafting.report.table import summary_table

__all__ = ["summary_table", "write_report"]

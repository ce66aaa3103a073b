"""All tables, by name."""

from __future__ import annotations

from benchmarks.papers import (
    c2ir_figure_2d,
    c2ir_table_1,
    c2ir_table_2,
    data_free,
    indicators_tables_4_5,
    lsgm_figure_5,
    lsgm_figure_6,
    lsgm_figure_7,
    lsgm_table_1,
    rg_table_2,
    rg_table_3,
    rg_table_4,
    rg_table_5,
    rg_tables_1_6_7,
    thinkback_table_1,
)
from benchmarks.papers.table import Table

TABLES: dict[str, Table] = {
    "c2ir-table-1": c2ir_table_1.TABLE,
    "c2ir-table-2": c2ir_table_2.TABLE,
    "c2ir-figure-2d": c2ir_figure_2d.TABLE,
    "indicators-tables-4-5": indicators_tables_4_5.TABLE,
    "thinkback-table-1": thinkback_table_1.TABLE,
    "lsgm-table-1": lsgm_table_1.TABLE,
    "lsgm-figure-5": lsgm_figure_5.TABLE,
    "lsgm-figure-6": lsgm_figure_6.TABLE,
    "lsgm-figure-7": lsgm_figure_7.TABLE,
    "rg-tables-1-6-7": rg_tables_1_6_7.TABLE,
    "rg-table-2": rg_table_2.TABLE,
    "rg-table-3": rg_table_3.TABLE,
    "rg-table-4": rg_table_4.TABLE,
    "rg-table-5": rg_table_5.TABLE,
    "data-free": data_free.TABLE,
}

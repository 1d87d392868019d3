"""Published benchmarks from their official files under one data root. See `layout` for where each file lies."""

from .layout import DATA_ROOT_VARIABLE, Absent, data_root
from .sets import OFFICIAL_SETS, OfficialSet, official_rows, official_set_of

__all__ = [
    "DATA_ROOT_VARIABLE",
    "OFFICIAL_SETS",
    "Absent",
    "OfficialSet",
    "data_root",
    "official_rows",
    "official_set_of",
]

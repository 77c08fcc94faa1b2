"""`mlx-diffgemma doctor`: is this machine's arithmetic right? Everything is compared with a CPU."""

from .plan import devices, examine
from .report import about, as_json, conclusion, counted, introduction, line

__all__ = [
    "about",
    "as_json",
    "conclusion",
    "counted",
    "devices",
    "examine",
    "introduction",
    "line",
]

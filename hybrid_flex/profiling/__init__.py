"""Profiling: traces that TensorBoard and Perfetto show, names in them, FLOP formulas, and reports made of traces."""

import hybrid_flex.profiling.flops  # noqa: F401  registers the formulas
from hybrid_flex.profiling.names import named
from hybrid_flex.profiling.report import Report, Row, report
from hybrid_flex.profiling.roofline import Roofline, measure_roofline
from hybrid_flex.profiling.trace import range, trace

__all__ = ["Report", "Roofline", "Row", "measure_roofline", "named", "range", "report", "trace"]

"""Programs and packages: a model or layer as one torch.export program, or compiled ahead of time into one file."""

from hybrid_flex.export.decode import export_decode
from hybrid_flex.export.packages import Package, load_package, package
from hybrid_flex.export.portable import portable
from hybrid_flex.export.programs import export_prefill, load, save
from hybrid_flex.export.runner import runner

__all__ = [
    "Package",
    "export_decode",
    "export_prefill",
    "load",
    "load_package",
    "package",
    "portable",
    "runner",
    "save",
]

"""Programs: a model or layer as one torch.export program, saved to a file and loaded without its Python source."""

from hybrid_flex.export.decode import export_decode
from hybrid_flex.export.programs import export_prefill, load, save
from hybrid_flex.export.runner import runner

__all__ = ["export_decode", "export_prefill", "load", "runner", "save"]

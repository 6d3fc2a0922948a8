"""Programs: a model or layer as one torch.export program, saved to a file and loaded without its Python source."""

from hybrid_flex.export.programs import export_prefill, load, save

__all__ = ["export_prefill", "load", "save"]

"""Operators: importing this package registers every ``hybrid_flex::`` operator with torch.library."""

"""Models: a configuration with a layer pattern, a block, a stack, and a language model that generates."""

from hybrid_flex.models.block import HybridBlock, LayerWiseHybrid
from hybrid_flex.models.config import HybridConfig
from hybrid_flex.models.language_model import HybridLanguageModel

__all__ = ["HybridBlock", "HybridConfig", "HybridLanguageModel", "LayerWiseHybrid"]

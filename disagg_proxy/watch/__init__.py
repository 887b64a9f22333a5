"""Engines that stand still although they ping and answer /health: noticed, recovered if possible, or taken out."""

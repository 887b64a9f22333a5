"""Stalled engines although they ping and answer /health: noticed, recovered if possible, or taken out."""

"""GroupNorm with what surrounds it in a residual block: concatenation, time embedding, SiLU, dropout."""

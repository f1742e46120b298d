"""The paper's figures of samples: progressive generation, shared latents, interpolation, nearest neighbours."""

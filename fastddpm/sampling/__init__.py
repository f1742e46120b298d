"""Sampling (Algorithm 2): the sampler, the reverse chain, and the engines that evaluate the network."""

"""Training (Algorithm 1 of the paper): loop, optimizer, multi-process strategies, run state, logging."""

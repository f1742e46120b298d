"""Algorithm 1: the trainer, its optimizer, its processes, and what watches a run."""

"""The implementations behind `fastddpm.ops`: one folder per operation, one file per backend.

The folder itself defines `Arguments`, which every implementation takes; `reference.py` is the specification.
Nothing here imports `fastddpm`, registers an operator or has any other effect at import.
"""

"""The implementations behind `fastddpm.ops`: one folder per operation, one file per backend.

Nothing here imports `fastddpm`, registers an operator or has any other effect at import.
"""

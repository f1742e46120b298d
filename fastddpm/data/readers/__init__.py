"""Readers, one for each kind of source: folders, archives, databases, and data sets as distributed."""

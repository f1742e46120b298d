"""One reader for each kind of source: folders, archives, databases, data sets as distributed."""

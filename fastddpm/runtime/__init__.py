"""What every command stands on: the command line, devices, processes, progress. Imports nothing of ours but errors."""

"""The runtime of the commands: command line, devices, processes, progress. Imports of fastddpm only the errors."""

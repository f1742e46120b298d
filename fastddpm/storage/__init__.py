"""Crash-safe files and strict parsers: checkpoints, shards, JSON documents, tensors."""

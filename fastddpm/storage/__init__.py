"""Files that survive crashes, full disks and strangers: checkpoints, shards, JSON documents, tensors."""

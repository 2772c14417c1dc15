"""From packed shards to batches: the global order, the training view, the threaded stream."""

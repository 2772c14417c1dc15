"""What is wrong with packed shards, shown."""

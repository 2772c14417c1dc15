"""What a run leaves on the disk: its directory, attempts, checkpoints and environment."""

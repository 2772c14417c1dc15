"""Ranks: joining the job, talking to each other, agreeing to stop, noticing who is lost."""

"""Losses in plain PyTorch, as sums and counts: means are taken over all ranks."""

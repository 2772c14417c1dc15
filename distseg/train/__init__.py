"""Training: the alternating step, the loop around it, and the command."""

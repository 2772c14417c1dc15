"""What a job would hold, send and compute, found without a device and without data."""

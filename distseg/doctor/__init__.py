"""Is this machine, or are these machines, fit for a run?"""

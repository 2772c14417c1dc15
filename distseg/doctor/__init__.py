"""Is this machine, or are these machines, fit for a run?"""

# of what machines share: where all of them fail in it, it is none of theirs
SHARED = ("run directory", "shards")

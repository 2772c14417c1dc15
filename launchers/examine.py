"""A look at one machine of a job, before ranks are started there: `python -m launchers.examine`.

Started by the supervisor once per node, `[--seconds N] [key=value ...]` with the overrides of a
training run. Its last line is its answer, as `launchers.nodes` reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import asdict

from distseg.config import loading
from distseg.doctor.node import examine_node
from launchers.nodes import ANSWER, NODE_VARIABLE
from launchers.places import ranks_per_node
from shards.errors import InputError


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("launchers.examine")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all that is looked at")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    try:
        config = loading.load(options.overrides) if options.overrides else None
    except InputError:
        # read well where the job was accepted: what is not there, as a file of code, says the run
        config = None
    results = examine_node(config, ranks_per_node(dict(os.environ)), options.seconds)
    answer = {
        "node": os.environ.get(NODE_VARIABLE) or socket.gethostname(),
        "time": time.time(),
        "results": [asdict(result) for result in results],
    }
    # in one piece: lines of several machines come through one pipe
    os.write(1, f"\n{ANSWER}{json.dumps(answer)}\n".encode())
    return 0


if __name__ == "__main__":
    code = main()
    # what hangs in a thread, in a disk that does not answer for example, must not be waited for
    sys.stdout.flush()
    os._exit(code)

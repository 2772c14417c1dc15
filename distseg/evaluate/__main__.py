"""`python -m distseg.evaluate`, which torchrun starts on every rank."""

import sys

from distseg.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))

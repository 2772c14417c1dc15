"""`python -m distseg.doctor`, which torchrun starts on every rank."""

import sys

from distseg.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))

"""`python -m distseg.doctor`, which torchrun starts on every rank."""

import sys

from distseg.cli import main
from shards.terminal import use_utf8

use_utf8()
sys.exit(main(["doctor", *sys.argv[1:]]))

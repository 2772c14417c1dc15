"""`python -m distseg`, the same as `distseg`."""

import sys

from distseg.cli import main
from shards.terminal import use_utf8

use_utf8()
sys.exit(main(sys.argv[1:]))

"""`python -m distseg.train`, which torchrun starts on every rank."""

import sys

from distseg.cli import main
from distseg.distributed.stop import StopRequest
from shards.terminal import use_utf8

use_utf8()
exit_code = main(["train", *sys.argv[1:]])
StopRequest.ignore()
sys.exit(exit_code)

"""`python -m distseg.train`, which torchrun starts on every rank."""

import sys

from distseg.cli import main
from distseg.distributed.stop import StopRequest

exit_code = main(["train", *sys.argv[1:]])
StopRequest.ignore()
sys.exit(exit_code)

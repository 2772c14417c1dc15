"""What a training changes of the process that it runs in, put back for a caller that lives on."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch

from distseg.distributed.device import allow_tf32
from distseg.distributed.stop import SIGNALS


@contextmanager
def restored_process() -> Iterator[None]:
    """However the block ends: signal handlers, numbers of threads, TF32, random states, environment
    variables and what the garbage collector looks at are afterwards as they were before.
    """
    # For `distseg.fit` in a notebook or a test, whose process goes on. The command needs none of
    # this: its process ends.
    environment, num_threads, cv2_threads = (
        dict(os.environ),
        torch.get_num_threads(),
        cv2.getNumThreads(),
    )
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    random_state = torch.get_rng_state()
    # asking for the state of a CUDA that is not initialised would initialise it, for a run on the
    # CPU too
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    num_frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        if not num_frozen:  # else they are the caller's, whom a few objects more will not hurt
            gc.unfreeze()
        if threading.current_thread() is threading.main_thread():  # no other may
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # the loop seeds torch at each step, so a caller's next random numbers would be those of our
        # last step
        torch.set_rng_state(random_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        allow_tf32(tf32[0])
        torch.backends.cudnn.allow_tf32 = tf32[1]
        torch.set_num_threads(num_threads)
        cv2.setNumThreads(cv2_threads)
        # srun's rendezvous is written there, and would be read by a second job of this process
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)

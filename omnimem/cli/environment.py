"""Environment of a process of a run: ranks, threads, warnings."""

import importlib
import logging
import os
import socket
import sys
import warnings

import torch
from torch import distributed

from omnimem.extras import installed


def prepare_process() -> None:
    """Set the environment of plain `python` (one rank, a free port), and of a host without a GPU.

    On the CPU DeepSpeed would compile a shared-memory op for minutes, and a run killed meanwhile leaves a lock that
    later runs wait for; gloo does not need the op.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(_free_port()))  # read, but no port is opened
        _join_alone()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # set before deepspeed is imported, which then prints nothing
        if installed("deepspeed"):
            importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        # Models that fit a CPU run are small: two threads were measured 10 times slower than one on a busy machine.
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

    # Calls of DeepSpeed by names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("accelerate.accelerator").addFilter(_is_news)


def _join_alone() -> None:
    """A process group of this process alone, whose store is in memory: another one would listen on all interfaces."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if distributed.is_available() and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def world_size() -> int:
    """Number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_news(record: logging.LogRecord) -> bool:
    """The Trainer accumulates by itself and sets accelerate to 1; accelerate warns about it in every run."""
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Run a function in several processes of torch.distributed (gloo, CPU), each with a time limit."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

# What a process imports before its function: the server of processes imports it once.
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers", "peft"]


class ProcessError(AssertionError):
    """A process raised, ended by a signal, or took too long."""


def run_processes(
    function: Callable, count: int, folder: Path, *arguments, seconds: float = 120.0
) -> list:
    """Call `function(rank, *arguments)` in `count` processes and return the results by rank.

    The processes form the default group of torch.distributed, and `torch.distributed.barrier` has
    been called when they end. A process that fails ends all others.

    Args:
        function: a function of a module; its result must be something that torch.save takes.
        count: the number of processes.
        folder: an empty folder, or one that other runs of this function used.
        arguments: what multiprocessing can pickle.
        seconds: how long all of it may take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    run = folder / f"run{len(list(folder.glob('run*')))}"
    run.mkdir(parents=True)
    processes = [
        context.Process(
            target=_call, args=(function, rank, count, run, seconds, arguments), daemon=True
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        _join(processes, run, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(run / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _join(processes: list, run: Path, seconds: float) -> None:
    """Wait until all processes have ended. Raise ProcessError if one fails, or after the time."""
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            # The others may have an error of their own to write, which may be the cause.
            time.sleep(0.5)
            break
        time.sleep(0.01)
    if any(process.exitcode != 0 for process in processes):
        codes = {rank: process.exitcode for rank, process in enumerate(processes)}
        texts = [path.read_text() for path in sorted(run.glob("*.error"))]
        raise ProcessError("\n".join([f"exit codes {codes} (None: did not end in time)", *texts]))


def _call(function: Callable, rank: int, count: int, run: Path, seconds: float, arguments) -> None:
    """Run in one process: join the group, call the function, keep its result or its error."""
    torch.set_num_threads(1)
    # Where a process waits that does not end in time.
    stacks = (run / f"{rank}.error").open("w")
    faulthandler.dump_traceback_later(0.9 * seconds, file=stacks)
    # Libraries that start from the environment (accelerate) find the group there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    torch.distributed.init_process_group(
        "gloo",
        init_method=(run / "group").absolute().as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
    try:
        result = function(rank, *arguments)
        torch.save(result, run / f"{rank}.pt")
        # A process that ends while the other one still talks to it may abort.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        stacks.write(f"rank {rank}:\n{traceback.format_exc()}")
        stacks.close()
        sys.stdout.flush()
        os._exit(1)


def run_program(command: list[str], seconds: float = 120.0) -> str:
    """Run a program that starts processes, and return what it printed. It must exit with 0.

    If it takes too long, it and its processes are ended.
    """
    root = Path(__file__).resolve().parents[2]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = program.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        output, _ = program.communicate()
        raise ProcessError(f"did not end in {seconds} s:\n{output}") from None
    if program.returncode:
        raise ProcessError(output)
    return output

"""Run a pure function over many inputs: here, in processes or on Ray, with one and the same result.

Buys: shards of an evaluation, seeds of a claim or blocks of a certificate on all cores or machines, in order, with
progress, and without silent loss: an error names its shard, and a worker that dies is reported, not waited for.

The result is the same bit for bit on every backend if the function is pure and draws from streams that belong to
samples (:mod:`robust_core.random`): every worker uses the caller's number of torch threads, on which the order of
summation depends. Processes are spawned (a forked process inherits locks and cannot use CUDA), so the function and
its inputs must be importable and picklable, and a script needs ``if __name__ == "__main__":``.

Source of the engine on clusters: Ray (extra ``ray``). Left out: fault tolerance by retries, since a pure function
fails again.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from robust_core.checks import check_choice, check_count
from robust_core.errors import RobustError, optional_import

__all__ = ["BACKENDS", "ShardError", "run_shards"]

BACKENDS = ("here", "processes", "ray")
Input = TypeVar("Input")
Output = TypeVar("Output")
OnStep = Callable[[int, int], None]


class ShardError(RobustError):
    """A shard failed; its cause is chained.

    Attributes:
        shard: position of the input, or None where a worker died and the shard is not known.
    """

    def __init__(self, message: str, shard: int | None) -> None:
        super().__init__(message)
        self.shard = shard


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def run_shards(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    *,
    backend: str = "here",
    workers: int = 2,
    on_step: OnStep | None = None,
) -> list[Output]:
    """Return ``[function(i) for i in inputs]``, in order.

    Args:
        function: pure; for processes and Ray, importable (a module's function, or a partial of one).
        inputs: one for each shard.
        backend: ``"here"`` (this process), ``"processes"`` (spawned), ``"ray"`` (a running or local cluster).
        workers: number of processes, or CPUs asked of a local Ray.
        on_step: called as ``on_step(done, total)`` in this process after each shard, in order of completion.

    Raises:
        ShardError: a shard raised (the cause is chained) or a worker died.
        MissingExtraError: Ray is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    check_count("workers", workers)
    if not inputs:
        return []
    run = {"here": _run_here, "processes": _run_processes, "ray": _run_ray}[backend]
    return run(function, inputs, workers, on_step or (lambda done, total: None))


def _failed(shard: int, total: int, error: BaseException) -> ShardError:
    return ShardError(f"shard {shard} of {total} failed: {type(error).__name__}: {error}", shard)


def _run_here(function: Callable[[Any], Any], inputs: Sequence[Any], workers: int, on_step: OnStep) -> list[Any]:
    results = []
    for shard, value in enumerate(inputs):
        try:
            results.append(function(value))
        except Exception as error:
            raise _failed(shard, len(inputs), error) from error
        on_step(shard + 1, len(inputs))
    return results


def _run_processes(function: Callable[[Any], Any], inputs: Sequence[Any], workers: int, on_step: OnStep) -> list[Any]:
    results: list[Any] = [None] * len(inputs)
    with ProcessPoolExecutor(
        min(workers, len(inputs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_set_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        shards = {pool.submit(function, value): shard for shard, value in enumerate(inputs)}
        for done, future in enumerate(as_completed(shards), 1):
            shard = shards[future]
            try:
                results[shard] = future.result()
            except BrokenProcessPool as error:
                raise ShardError(
                    f"a worker process died (killed, out of memory, or crashed) with {len(inputs) - done + 1} of "
                    f"{len(inputs)} shards open; use fewer workers or smaller shards",
                    None,
                ) from error
            except Exception as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise _failed(shard, len(inputs), error) from error
            on_step(done, len(inputs))
    return results


def _run_ray(function: Callable[[Any], Any], inputs: Sequence[Any], workers: int, on_step: OnStep) -> list[Any]:
    ray: Any = optional_import("ray", extra="ray")
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    threads = torch.get_num_threads()

    def shard_task(value: Any) -> Any:
        _set_threads(threads)
        return function(value)

    remote = ray.remote(num_cpus=1, max_retries=0)(shard_task)
    try:
        shards = {remote.remote(value): shard for shard, value in enumerate(inputs)}
        results: list[Any] = [None] * len(inputs)
        pending = list(shards)
        while pending:
            (ready, *_), pending = ray.wait(pending, num_returns=1)
            shard = shards[ready]
            try:
                results[shard] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise _failed(shard, len(inputs), error.cause or error) from error
            except ray.exceptions.RayError as error:
                raise ShardError(f"the worker of shard {shard} of {len(inputs)} died: {error}", shard) from error
            on_step(len(inputs) - len(pending), len(inputs))
        return results
    finally:
        if ours:
            ray.shutdown()

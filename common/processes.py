"""Several processes of one run, on one machine or on many: who they are, and what they tell each other.

Each process trains and evaluates a share of the members on its own devices, and process 0 writes the results. Members
do not communicate, so that what is exchanged is small and rare: it goes through the key-value store of JAX's
distributed service, which needs neither devices nor compilation nor equal shapes, on a CPU as on a GPU.

A process that ends says so, and the others end at their next exchange. One that is killed cannot: JAX then ends the
others, within seconds if it was process 0 and within about 100 seconds otherwise.
"""

import atexit
import contextlib
import io
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed  # the store and the detection of a cluster have no public names

from common.errors import UsageError
from common.populations import concatenate, is_key

Item = TypeVar("Item")
START_TIMEOUT = 60
"""Seconds for all processes to appear."""
PIECE = 1 << 24
"""Bytes of a value in the store; a message of 2^31 would be too long."""


class Processes:
    """This process alone, or all processes that JAX's distributed service has connected."""

    def __init__(self) -> None:
        state = distributed.global_state
        self.index, self.count, self._client = state.process_id, state.num_processes, state.client
        self._round = 0
        if self.count > 1:
            atexit.register(self._leave)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part: contiguous, in the order of the processes, of equal length as far as that goes."""
        start, stop = (i * len(items) // self.count for i in (self.index, self.index + 1))
        return items[start:stop]

    def gather(self, tree: Any, everywhere: bool = True) -> Any:
        """Trees of host arrays `[any number, ...]` of all processes, joined along the first axis in their order.

        All processes must call it, and wait for each other; unless `everywhere`, process 0 alone has the result and
        the others have their own tree back. UsageError if a process has ended.
        """
        if self.count == 1:
            return tree
        self._round += 1
        leaves, structure = jax.tree.flatten(tree)
        payload = io.BytesIO()
        np.savez(payload, *[np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves])
        self._send(payload.getvalue())
        if not (everywhere or self.first):
            return tree
        parts = []
        for process in range(self.count):
            with np.load(io.BytesIO(self._receive(process)), allow_pickle=False) as file:
                arrays = [file[name] for name in file.files]
            keys = [jax.random.wrap_key_data(a) if is_key(b) else a for a, b in zip(arrays, leaves, strict=True)]
            parts.append(jax.tree.unflatten(structure, keys))
        if self.first:  # who has come to this round has read all of the last one
            self._client.key_value_delete(f"offax/{self._round - 1}")
        return concatenate(parts)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 runs the block, then the others do, who find what it left."""
        if not self.first:
            self.gather(())
        yield
        if self.first:
            self.gather(())

    def _send(self, payload: bytes) -> None:
        place = f"offax/{self._round}/{self.index}"
        pieces = [payload[i : i + PIECE] for i in range(0, len(payload), PIECE)]
        for i, piece in enumerate(pieces):
            self._client.key_value_set_bytes(f"{place}/{i}", piece)
        self._client.key_value_set(f"{place}/pieces", str(len(pieces)))

    def _receive(self, process: int) -> bytes:
        place = f"offax/{self._round}/{process}"
        pieces = int(self._get(process, f"{place}/pieces"))
        if not pieces:
            raise UsageError(f"process {process} has ended, so process {self.index} ends too")
        return b"".join(self._get(process, f"{place}/{i}") for i in range(pieces))

    def _get(self, process: int, key: str) -> bytes:
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, 1000)  # milliseconds: a second signal is heard
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise UsageError(f"process {self.index} lost the connection to process {process}") from None

    def _leave(self) -> None:
        """An empty contribution to the next round, for those who wait for this process."""
        self._round += 1
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._send(b"")


def join() -> Processes:
    """Connect to the processes that the environment names; before anything else touches the devices.

    The variables are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or those of a cluster that JAX
    knows (SLURM, Open MPI, Kubernetes). UsageError if they are not set or process 0 is not there.
    """
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        given = [int(os.environ[name]) if name in os.environ else None for name in names]
    except ValueError:
        raise UsageError(f"--distributed: {' and '.join(names)} must be whole numbers") from None
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, _ = detect(os.environ.get("JAX_COORDINATOR_ADDRESS"), *given, None, None, START_TIMEOUT)
    if address is None or count is None or index is None:
        raise UsageError(
            "--distributed: set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID for each process, or start them with srun"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= index < count:
        raise UsageError(f"--distributed: process {index} of {count} with coordinator {address} makes no sense")
    if index:
        _await(host.strip("[]"), int(port))  # JAX itself would abort the process
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=START_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--distributed: {' '.join(str(error).split())}") from None
    return Processes()


def _await(host: str, port: int) -> None:
    until = time.monotonic() + START_TIMEOUT
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                reason = f"{host}:{port} is not reachable ({error.strerror or error})"
                raise UsageError(f"--distributed: the coordinator {reason}") from None
        time.sleep(0.2)

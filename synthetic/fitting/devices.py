"""Devices: one mesh over all of them, start-up of several processes, and who writes files.

The same program runs on one device, on all devices of a machine and in several processes. The
batch is one global batch whatever the number of devices: every example is a function of the key
and its index alone (`jax_threefry_partitionable`), so that only rounding depends on the split.
"""

import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SEED = "seed"
DATA = "data"


def mesh(seeds: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `("seed", "data")` over all devices of all processes.

    The seed axis gets the largest number of devices that divides both `seeds` and the number of
    devices; the data axis gets the rest.

    Args:
        seeds: number of seeds fitted at once, at least 1.
        devices: the devices to use; None takes `jax.devices()`.

    Raises:
        ValueError: `seeds` below 1 or no device.
    """
    devices = list(jax.devices() if devices is None else devices)
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be at least 1")
    if not devices:
        raise ValueError("devices=[]: must hold at least one device")
    along_seed = math.gcd(seeds, len(devices))
    shape = (along_seed, len(devices) // along_seed)
    return jax.make_mesh(shape, (SEED, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
    """Joins this process to the others through `jax.distributed`; call it before any other jax.

    Arguments left out are read from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`. With a coordinator but neither number, jax asks the cluster (Slurm, MPI, TPU).

    Args:
        coordinator: `"host:port"` of process 0.
        num_processes: number of processes in all, at least 1.
        process_id: this process' number, from 0.

    Returns:
        Whether there is more than one process. Without a coordinator nothing is started.

    Raises:
        ValueError: an incomplete or impossible combination.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _from_environment("num_processes", num_processes, "JAX_NUM_PROCESSES")
    process_id = _from_environment("process_id", process_id, "JAX_PROCESS_ID")
    if (num_processes is None) != (process_id is None):
        raise ValueError(
            f"num_processes={num_processes}, process_id={process_id}: give both or neither"
        )
    if num_processes is not None and process_id is not None:
        if num_processes < 1:
            raise ValueError(f"num_processes={num_processes}: must be at least 1")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id}: must be in 0..{num_processes - 1}")
        if coordinator is None and num_processes > 1:
            raise ValueError(f"coordinator=None: num_processes={num_processes} needs host:port")
    if coordinator is None:
        return False
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator={coordinator!r}: must be host:port, with a port up to 65535")
    if process_id == 0:
        _check_port(int(port))
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return jax.process_count() > 1


def _check_port(port: int) -> None:
    """ValueError where another program has the port: jax's own server then ends the process."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ValueError(f"coordinator: port {port} cannot be opened: {error.strerror}") from error


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process holds in full, laid out over the mesh of `sharding`."""

    def one(leaf: Any) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_first_process(action: Callable[[], bytes]) -> bytes:
    """Runs `action` on process 0 only and gives its bytes to every process.

    What reads or writes files goes through here, so that processes need no shared disk and agree
    on what was found.

    Raises:
        Whatever `action` raises on process 0; RuntimeError with the same message elsewhere.
    """
    if jax.process_count() == 1:
        return action()
    error: Exception | None = None
    result = b""
    if jax.process_index() == 0:
        try:
            result = b"+" + action()
        except Exception as caught:
            error, result = caught, b"-" + str(caught).encode()
    result = _broadcast(result)
    if error is not None:
        raise error
    if result[:1] == b"-":
        raise RuntimeError(f"process 0: {result[1:].decode()}")
    return result[1:]


def _broadcast(data: bytes) -> bytes:
    # Bytes, not arrays: a broadcast of floats is a sum with zeros, which loses float64 and -0.
    from jax.experimental import multihost_utils

    length = multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32))
    buffer = np.zeros(int(length), np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes()


def _from_environment(name: str, value: int | None, variable: str) -> int | None:
    if value is not None:
        return value
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"{variable}={text!r}: must be the integer {name}")
    return int(text)

"""The start of a job of several processes."""

import os

import jax

from jaxdp.checks import check_integer

# JAX makes them one by one: a thousand take a second, and a typing error would take days.
_MOST_DEVICES = 1024
_VIRTUAL = "xla_force_host_platform_device_count"


def join(
    coordinator: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    devices: int | None = None,
) -> None:
    """Makes this process one of several, by `jax.distributed.initialize`, before JAX is used.

    Args:
      coordinator: "host:port" of process 0, "auto" to detect cluster, numbers and address as JAX
        does (SLURM, Open MPI, Kubernetes, TPU pods), or None for a process on its own.
      num_processes: number of processes.
      process_id: number of this process, in 0..num_processes-1.
      devices: number of devices of this process, if it runs on a CPU. A CPU counts as one device
        by default. On other platforms this changes nothing, see `data_parallel`.

    Raises:
      ValueError: numbers without a coordinator, no device or too many, or the others cannot be
        reached.

    Example:
      >>> join()  # on its own
    """
    if coordinator is None and not (num_processes is None and process_id is None):
        raise ValueError(
            f"num_processes={num_processes} and process_id={process_id} need a coordinator. Pass "
            "host:port of process 0, or 'auto'."
        )
    if devices is not None:
        advice = "Pass the devices of this process."
        check_integer("devices", devices, minimum=1, maximum=_MOST_DEVICES, advice=advice)
    # JAX refuses a second setting.
    if devices is not None and _VIRTUAL not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is None:
        return
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except RuntimeError as error:
        raise ValueError(
            f"coordinator {coordinator!r} cannot be joined as process {process_id} of "
            f"{num_processes}: {error}"
        ) from error

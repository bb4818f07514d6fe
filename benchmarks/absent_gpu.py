"""A driver with which Triton compiles kernels for a GPU that is not present, and launches none."""

from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from lightning_lars.optim.backends import choice


class AbsentGPU:
    """A Triton driver that compiles kernels for a compute capability, and records their launches.

    Args:
        capability: Ten times the compute capability, as Triton has it.
    """

    def __init__(self, capability: int = 90) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        """The name and the arguments of each launch."""

        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**17, "multiprocessor_count": 132},
            load_binary=lambda *_: (object(), 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the launcher of a kernel, as Triton expects it."""
        return lambda *args: self.launches.append((metadata.name, args[9:]))

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the handle of the stream."""
        return 0

    @classmethod
    def install(cls, capability: int = 90) -> "AbsentGPU":
        """Make it Triton's driver in this process, with kernels for tensors on the CPU."""
        driver = cls(capability)
        triton.runtime.driver.set_active(driver)
        choice.TRITON_DEVICES.add("cpu")
        return driver

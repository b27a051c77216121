"""The device under a benchmark: its name and settings, read and never changed; its memory; its energy where NVML is."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "xformers", "triton")
STEADY_S = 5.0  # of work under which an energy reading is noise
MIB = 1 << 20


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return told or platform.processor() or f"CPU with {os.cpu_count()} cores"


def software(device: torch.device) -> dict[str, Any]:
    """Versions, and what of the device can be read: driver, clocks in MHz, power cap in W."""
    from fastgen import __version__

    facts: dict[str, Any] = {"fastgen": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        nvml = Nvml.of(device)
        facts |= nvml.facts() if nvml else {"nvml": "not installed, or it does not know the device"}
    return facts


class Nvml:
    """NVIDIA's management library for one device; see `of`."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @staticmethod
    def of(device: torch.device) -> Nvml | None:
        """None where the package is missing or does not find the device (a slice of a card has no counters)."""
        if device.type != "cuda":
            return None
        try:
            library = importlib.import_module("pynvml")
            library.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            return Nvml(library, library.nvmlDeviceGetHandleByUUID(name))
        except Exception:  # an optional figure: whatever is wrong with the library, the row says null
            return None

    def _ask(self, name: str, *arguments: Any) -> Any:
        """None where the card does not answer this question."""
        try:
            return getattr(self.library, name)(self.handle, *arguments)
        except Exception:
            return None

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def facts(self) -> dict[str, Any]:
        driver = self.library.nvmlSystemGetDriverVersion()
        cap = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_SM),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_MEM),
            "power_cap_w": None if cap is None else cap / 1000,
        }


@dataclass
class Reading:
    """Of a pass: peak memory of the allocator, energy of the card; None where it cannot be read."""

    peak_alloc_mib: float | None = None
    peak_reserved_mib: float | None = None
    energy_j: float | None = None


class Meter:
    """`with meter(): ...` fills `reading`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.reading = device, Reading()
        self._nvml = Nvml.of(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = self._nvml.energy_j() if self._nvml else None
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        torch.cuda.synchronize(self.device)
        after = self._nvml.energy_j() if self._nvml else None
        long_enough = began.elapsed_time(ended) / 1000 >= STEADY_S
        self.reading = Reading(
            torch.cuda.max_memory_allocated(self.device) / MIB,
            torch.cuda.max_memory_reserved(self.device) / MIB,
            after - before if long_enough and before is not None and after is not None else None,
        )

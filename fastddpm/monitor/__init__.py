"""Watching a run: its progress line, log, TensorBoard or Weights & Biases, previews, loss by timestep and profile."""

from .by_timestep import LossByTimestep
from .clock import Clock, memory_mib
from .environment import record_session
from .previews import Previews, network_with
from .profiling import Profile
from .sinks import Sink, Sinks, open_sinks
from .watch import MEASURED, Monitor

__all__ = [
    "MEASURED",
    "Clock",
    "LossByTimestep",
    "Monitor",
    "Previews",
    "Profile",
    "Sink",
    "Sinks",
    "memory_mib",
    "network_with",
    "open_sinks",
    "record_session",
]

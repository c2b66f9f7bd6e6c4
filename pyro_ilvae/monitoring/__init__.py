"""A monitor of collapse during the training, for any training loop and any logger."""

from pyro_ilvae.monitoring.collapse_monitor import CollapseMonitor

__all__ = ["CollapseMonitor"]

"""What a tower's regions are worth by themselves, before any language model."""

from .run import ProbeConfig, probe, probe_table

__all__ = ["ProbeConfig", "probe", "probe_table"]

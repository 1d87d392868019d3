"""Region records -> trained checkpoints."""

"""Processes: those that hold models and those that decode images."""

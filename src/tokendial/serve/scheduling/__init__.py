"""Scheduling: which images run together, when, and at which degree."""

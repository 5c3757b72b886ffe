"""Replicas on a Ray cluster."""

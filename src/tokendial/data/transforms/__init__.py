"""Transforms of images, clips, and images with masks."""

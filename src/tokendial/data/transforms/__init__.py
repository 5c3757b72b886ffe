"""Transforms of images, of images with masks, and of videos."""

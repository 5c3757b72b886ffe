"""Readers of images, masks and videos, and checks of what is in a folder."""

"""Readers of files: images, masks, videos, lists and MATLAB files; they know no data set."""

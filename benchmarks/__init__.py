"""Programs that measure Tokendial against its peers: `python -m benchmarks COMMAND`."""

"""HTTP server for finished runs: it keeps a latency objective by changing the degree."""

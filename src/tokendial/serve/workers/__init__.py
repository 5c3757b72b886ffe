"""Worker processes: those that hold and run models, and those that decode images."""

"""Data sets, one file per family; each registered class is a value of the recipe's `data.name`."""

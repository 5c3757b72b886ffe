"""Names of metrics as tables, plots and model cards write them."""

_TITLES = {"auroc": "AUROC", "f1": "F1"}


def metric_title(name: str) -> str:
    """Return a metric's name for readers.

    Example:
        >>> metric_title("balanced_accuracy"), metric_title("f1")
        ('balanced accuracy', 'F1')
    """
    return _TITLES.get(name, name.replace("_", " "))

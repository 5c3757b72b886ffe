"""A loader for fork servers that reports the loaded modules. It imports few modules itself."""

import sys


def load_and_report(path, runs):
    """Load models, and write the names of all modules of this process."""
    from tokendial.serve.workers.models import load_models

    models = load_models(runs)
    path.write_text("\n".join(sys.modules))
    return models

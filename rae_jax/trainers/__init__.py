"""One program per file: how a model, a loss and data become a run."""

"""Scalar losses of networks and batches, with the metrics to log."""

"""Weights in foreign formats and under foreign names, as plain parameter dicts."""

"""Image sources, transforms and the checkpointable batch iterators."""

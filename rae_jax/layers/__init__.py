"""Network parts that take numbers, never configs."""

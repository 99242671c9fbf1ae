"""Training recipes: the one place that knows data sets, training loops and command lines."""

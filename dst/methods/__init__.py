"""Methods that go beyond pruning and growing each tensor for itself; `dst` offers them all."""

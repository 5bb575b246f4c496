"""What an eviction costs a model: tasks, metrics, trials on one document."""

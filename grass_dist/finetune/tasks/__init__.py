"""What a model is trained for: each family of tasks is one file, by the interface of `base`."""

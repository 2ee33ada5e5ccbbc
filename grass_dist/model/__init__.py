"""What a model is made of: its layers and roles, and which of them train."""

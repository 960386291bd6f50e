"""YAML with origins, and the schema of the training configuration: what the login node and the trainer share."""

"""What several of the integration tests share: ranks and hosts, the model, the loops over it, the reference run."""

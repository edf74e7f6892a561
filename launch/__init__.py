"""Options, processes and signals: what is settled before and around the training."""

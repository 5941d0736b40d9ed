"""The contrastive loss and its gradient for a batch split into micro-batches."""

"""One file per task: what a row means, the model class, the batch, the loss, the metrics."""

"""The training engine: one visible loop over three seams (model, batches, loss), and what makes its state durable."""

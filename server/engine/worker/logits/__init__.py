"""What changes logits, between the model and the sampler."""

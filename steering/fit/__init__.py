"""Fitting: from texts to a vector file, by reading activations where some model gives them (see `source`)."""

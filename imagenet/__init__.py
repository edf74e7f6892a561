"""ImageNet, or any data set of its form: reading and converting."""

"""What a training run is made of: its components, the tuner before it, its metrics, its state."""

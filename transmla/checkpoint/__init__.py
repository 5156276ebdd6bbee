"""Safetensors checkpoints in and out; nothing here knows what the weights mean."""

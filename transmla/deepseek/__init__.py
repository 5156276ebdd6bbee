"""What the target looks like: DeepSeek-V3's sizes, config, tensor names, latent norm, and the engines that load it."""

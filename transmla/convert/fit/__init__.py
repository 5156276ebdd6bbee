"""What is learnt on text after the closed form: refit, healing, latent norm, routers."""

"""Codecs: the text encoders and autoencoders of latent teachers, one file per kind."""

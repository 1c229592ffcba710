"""The base assembled from pretrained parts: features of rendered media, projectors in closed form, and an adapter."""

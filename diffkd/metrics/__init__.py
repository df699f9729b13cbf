"""Measuring: feature networks, distances between sets of images, and models measured with their protocol."""

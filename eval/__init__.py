"""Scores: image quality, class agreement, denoising loss and speed, each usable alone on images or a host."""

"""Liquid-Time nanochat: train your own ChatGPT on a hybrid of short convolutions and attention."""

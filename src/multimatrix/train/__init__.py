"""Training one model; the loop is transformers' Trainer."""

"""Arithmetic under the variants: functions on tensors, no nn.Module."""

"""Distillation: the losses (`logits`, `features`), how features are read (`taps`) and adapted, the training step, and the teacher."""

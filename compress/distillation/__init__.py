"""Distillation: losses (`logits`, `features`), reading and adapting features, the training step, the teacher."""

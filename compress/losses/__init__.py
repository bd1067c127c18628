"""Losses of distillation: pure functions of logits (`logits`) and of features (`features`), and how features are read and adapted."""

from compress.losses.logits import cross_entropy_loss, kd_loss

__all__ = ["cross_entropy_loss", "kd_loss"]

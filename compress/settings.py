"""Translate a recipe's sections into the plain arguments that algorithms take. Imports no torch."""

from pathlib import Path

from compress.data.digest import DataSettings
from compress.recipe import Recipe


def data_settings(recipe: Recipe) -> DataSettings:
    """Return what decides a recipe's images, their split and their preprocessing."""
    data = recipe.data
    return DataSettings(
        name=data.dataset,
        path=None if data.path is None else Path(data.path),
        image_size=data.image_size,
        resize=data.resize,
        mean=data.mean,
        std=data.std,
        val_fraction=data.val_fraction,
        limit_per_class=data.limit_per_class,
        skip_broken=data.skip_broken,
        seed=recipe.seed,
    )

"""What files answer, as scores that no file was run for."""

import numpy as np
from numpy.typing import NDArray

from export.runtime.accuracy import Score
from export.tasks.classification import CLASSIFICATION, statistics


def answered(
    predictions: NDArray[np.int64], labels: NDArray[np.int64], in_top5: NDArray[np.bool_] | None = None
) -> Score:
    """Return the score of one predicted class for each image; `in_top5` says where the label is among five likeliest."""
    rows = statistics(predictions[:, None], labels, (int(labels.max()) + 1,))
    if in_top5 is not None:
        rows = np.concatenate([rows, in_top5[:, None].astype(np.int64)], axis=1)
    return Score(CLASSIFICATION, predictions[:, None], rows)

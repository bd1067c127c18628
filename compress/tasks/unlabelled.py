"""Classification of images without labels: the teacher's predictions serve as labels."""

from dataclasses import replace

from compress.data.labelled import open_unlabelled
from compress.tasks.classification import CLASSIFICATION
from export.tasks.unlabelled import UNLABELLED as OUTPUT

UNLABELLED = replace(CLASSIFICATION, output=OUTPUT, open=open_unlabelled)

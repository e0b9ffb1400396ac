"""Measures of a feature space: k-NN accuracy, linear probes, retrieval.

features     features of a set, computed once
knn          the weighted vote of the nearest neighbours, in training and after it
probe        linear classifiers on cached features, by SGD or L-BFGS
retrieval    how many of the nearest images are of the query's class

The vote is for features of any origin: ``softcl.knn_predict(features, bank, bank_labels, 10)``.
"""

from softcl.evaluation.features import eval_mode, extract, thinned
from softcl.evaluation.knn import KNN, NUM_NEIGHBORS, TEMPERATURE, knn_predict, nearest_rows, vote

__all__ = [
    "KNN",
    "NUM_NEIGHBORS",
    "TEMPERATURE",
    "eval_mode",
    "extract",
    "knn_predict",
    "nearest_rows",
    "thinned",
    "vote",
]

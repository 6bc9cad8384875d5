"""Held-out problems: accuracy, likelihood, and evaluations that resume."""

from latro.evaluation.accuracy import EvaluationSettings, evaluate_model

__all__ = ["EvaluationSettings", "evaluate_model"]

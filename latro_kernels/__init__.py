"""Fused log-probabilities, KL and samples at the LM head, and group advantages made of them."""

from latro_kernels.decode_attention import DecodedRows, KeptKeys, decode_attention
from latro_kernels.environment import environment
from latro_kernels.few_rows_linear import few_rows_linear
from latro_kernels.gather_logprob import gather_logprob
from latro_kernels.group_advantage import GroupAdvantage, GroupLayout, group_advantage
from latro_kernels.group_advantage.formulas import (
    floored,
    leave_one_out,
    segment_of_rows,
    segment_sums,
)
from latro_kernels.linear_jsd import linear_jsd
from latro_kernels.linear_kl import linear_kl
from latro_kernels.linear_logprob import linear_logprob
from latro_kernels.linear_sample import LinearSample, linear_sample
from latro_kernels.linear_topk import TopK, linear_topk, linear_topk_kl, linear_topk_logprob
from latro_kernels.native import BackendUnavailableError
from latro_kernels.row_statistics import RowStatistics

__all__ = [
    "BackendUnavailableError",
    "DecodedRows",
    "GroupAdvantage",
    "GroupLayout",
    "KeptKeys",
    "LinearSample",
    "RowStatistics",
    "TopK",
    "decode_attention",
    "environment",
    "few_rows_linear",
    "floored",
    "gather_logprob",
    "group_advantage",
    "leave_one_out",
    "linear_jsd",
    "linear_kl",
    "linear_logprob",
    "linear_sample",
    "linear_topk",
    "linear_topk_kl",
    "linear_topk_logprob",
    "segment_of_rows",
    "segment_sums",
]

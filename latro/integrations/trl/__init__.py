"""The answer's likelihood as a reward, its own gradient, and shared prefixes, in TRL's trainers.

    from latro.integrations.trl import AnswerGradient, AnswerLikelihood, SharedPrefix

    class Trainer(AnswerGradient, SharedPrefix, RLOOTrainer): ...

    Trainer(model, AnswerLikelihood(model, tokenizer), args, dataset, processing_class=tokenizer)

Each is of use without the others. What samples (vLLM, tools), metrics and the policy's loss stay
TRL's. `latro_kernels.integrations.trl` has the fused head for TRL's own log-probs.
"""

from latro.integrations.trl.gradient import AnswerGradient
from latro.integrations.trl.reward import AnswerLikelihood
from latro.integrations.trl.shared_prefix import SharedPrefix

__all__ = ["AnswerGradient", "AnswerLikelihood", "SharedPrefix"]
